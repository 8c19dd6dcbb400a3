"""Which parents of a tree a batch visits on all ranks, and what each learns from it.

A codebook by itself is the one parent of all vectors.
"""

import torch
import torch.distributed as dist
from jaxtyping import Bool, Float, Int
from torch import Tensor

from latentcast.distributed import rank_and_world
from latentcast.metrics.perplexity import histogram


class RoutedBatch:
    """What a batch brings to the wanted ones of P parents, without vectors that overflowed under fp16.

    Args:
        vectors: of this rank's batch; N may differ between ranks.
        parents: of each; None: all have the only one.
        wanted: the parents that learn from this batch.
        codebook_size: K, codes of a parent.
    Attributes:
        ids: (A,), the wanted parents that some rank visits, or all there are: the only one, and on a GPU.
        rows: (A, K), the rows of their codes in a codebook of P * K.
        visits: (A,), their vectors on all ranks, 0 of those that are not wanted; ``seen``, (A, 1), whether there are.
        vectors: (N, dim) fp32.
        slots: (N,), for each vector the place of its parent in ids, or A where it does not count.
    """

    def __init__(
        self,
        vectors: Float[Tensor, "N dim"],
        parents: Int[Tensor, " N"] | None,
        wanted: Bool[Tensor, " P"],
        codebook_size: int,
    ) -> None:
        n_parents, self.codebook_size = len(wanted), codebook_size
        if parents is None:
            parents = torch.zeros(len(vectors), dtype=torch.int64, device=vectors.device)
        keep = vectors.isfinite().all(-1) & wanted[parents]
        self.vectors = torch.where(keep[:, None], vectors, 0).float()
        visits = _sum_over_ranks(histogram(parents, n_parents, keep))
        every = n_parents == 1 or parents.device.type != "cpu"  # the host would wait to know which are visited
        self.ids = torch.arange(n_parents, device=parents.device) if every else visits.nonzero()[:, 0]
        self.rows = self.ids[:, None] * codebook_size + torch.arange(codebook_size, device=parents.device)
        slot_of = torch.zeros_like(visits)
        slot_of[self.ids] = torch.arange(len(self.ids), device=parents.device)
        self.slots = torch.where(keep, slot_of[parents], len(self.ids))
        self.visits = visits[self.ids]
        self.seen = self.visits[:, None] > 0

    def statistics(self, codes: Int[Tensor, " N"]) -> tuple[Float[Tensor, "A K"], Float[Tensor, "A K dim"]]:
        """Of each code the number and the sum of its vectors on all ranks; codes in [0, K)."""
        n_slots, K = self.rows.shape
        packed = torch.cat([self.vectors, self.vectors.new_ones(len(self.vectors), 1)], -1)
        sums = packed.new_zeros((n_slots + 1) * K, packed.shape[-1]).index_add_(0, self.slots * K + codes, packed)
        sums = _sum_over_ranks(sums[: n_slots * K]).unflatten(0, (n_slots, K))
        return sums[..., -1], sums[..., :-1]

    def draw(self) -> tuple[Float[Tensor, "A K dim"], Int[Tensor, " A"]]:
        """Up to K different vectors of each parent, the same on every rank, and how many they are."""
        vectors, (n_slots, K), device = self.vectors, self.rows.shape, self.vectors.device
        order = torch.randperm(len(vectors), device=device)
        order = order[self.slots[order].argsort(stable=True)]  # shuffled within each parent
        slots = self.slots[order]
        counts = histogram(slots, n_slots + 1)
        turn = torch.arange(len(order), device=device) - (counts.cumsum(0) - counts)[slots]
        # Ranks take turns. A vector's place is the number of vectors before it: of each rank those with a lower turn,
        # and of lower ranks the one with the same turn.
        rank, n_ranks = rank_and_world()
        ranks = torch.arange(n_ranks, device=device)[:, None]
        counts = _sum_over_ranks(torch.where(ranks == rank, counts, 0))
        places = torch.minimum(counts[:, slots], turn + (ranks < rank)).sum(0)
        taken = (places < K) & (slots < n_slots)
        drawn = vectors.new_zeros(n_slots * K + 1, vectors.shape[-1])
        drawn.index_copy_(0, torch.where(taken, slots * K + places, n_slots * K), vectors[order])
        drawn = _sum_over_ranks(drawn[:-1]).unflatten(0, (n_slots, K))
        return drawn, counts.sum(0)[:n_slots].clamp(max=K)


def _sum_over_ranks(tensor):
    if rank_and_world()[1] > 1:
        dist.all_reduce(tensor)
    return tensor


class Later:
    """A bool that a GPU finds out and the host reads when it is long there; other work goes on meanwhile."""

    def __init__(self, found: Bool[Tensor, ""]) -> None:
        self.found, self.there = found.to("cpu", non_blocking=True), torch.cuda.Event()
        self.there.record()

    def __bool__(self) -> bool:
        self.there.synchronize()
        return bool(self.found)

    def __deepcopy__(self, memo: dict) -> None:
        """Nothing is known of a copy."""
