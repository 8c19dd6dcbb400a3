"""The nearest of many code vectors, in bounded memory."""

import torch
from jaxtyping import Float, Int
from torch import Tensor

# What a search works on at once, which bounds its memory: a CPU should stay in its cache and not start its threads too
# often, a GPU wants few and large kernels. Distances (of at least LEAST vectors), and numbers of code vectors gathered
# for local searches.
SEARCHED_CPU, SEARCHED_GPU, LEAST = 2**20, 2**24, 256
GATHERED_CPU, GATHERED_GPU = 2**17, 2**25


def nearest_of_all(vectors: Float[Tensor, "N dim"], codes: Float[Tensor, "K dim"]) -> Int[Tensor, " N"]:
    """Number of the nearest code of each vector (fp32) by Euclidean distance, int64."""
    # |x - e|^2 = |x|^2 - 2 x.e + |e|^2. Distances are taken from the codebook's mean, because the expansion cancels
    # badly far from the origin.
    center = codes.mean(0)
    codes = codes - center
    half_norms = codes.square().sum(-1) / 2
    size = max(LEAST, _at_once(codes.device, SEARCHED_CPU, SEARCHED_GPU) // len(codes))
    found = torch.empty(len(vectors), dtype=torch.int64, device=codes.device)
    distances = half_norms.new_empty(min(size, len(vectors)), len(codes))  # one for all: fresh memory is slow
    for x, nearest in zip(vectors.split(size), found.split(size)):
        nearest.copy_(_argmin(torch.addmm(half_norms, x - center, codes.T, alpha=-1, out=distances[: len(x)])))
    return found


def nearest_of_children(
    vectors: Float[Tensor, "N dim"], families: Float[Tensor, "P K dim"], parents: Int[Tensor, " N"]
) -> Int[Tensor, " N"]:
    """Number of the nearest of each vector's (fp32) parent's codes, which are a family: int64 in [0, K)."""
    rows = families.flatten(1)  # selecting long rows is several times as fast as indexing the three axes
    chunk = max(1, _at_once(rows.device, GATHERED_CPU, GATHERED_GPU) // rows.shape[1])
    found = []
    for x, p in zip(vectors.split(chunk), parents.split(chunk)):
        children = rows.index_select(0, p).unflatten(1, families.shape[1:])
        distances = torch.cdist(x[:, None], children, compute_mode="donot_use_mm_for_euclid_dist")
        found.append(distances[:, 0].argmin(-1))
    return torch.cat(found)


def _at_once(device, per_thread, on_gpu):
    if device.type != "cpu":
        return on_gpu
    return per_thread * (1 if torch.compiler.is_compiling() else torch.get_num_threads())  # which would break the graph


def _argmin(distances, group=64):
    """``argmin(-1)`` of (N, K), contiguous; on a CPU torch finds a minimum several times as fast as its place."""
    n_groups = distances.shape[1] // group
    if distances.device.type != "cpu" or n_groups < 4 or distances.shape[1] % group:
        return distances.argmin(-1)
    rows = distances.view(-1, group)
    best = rows.amin(-1).view(-1, n_groups).argmin(-1)
    members = rows.index_select(0, best + torch.arange(0, len(rows), n_groups))
    return best * group + members.argmin(-1)
