"""A codebook that follows its encoder by exponential moving averages: the part that all quantizers share."""

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

SEARCH_CHUNK = 8192  # vectors compared with all codes at once; bounds the memory of a search at (chunk, K) floats


def _world_size():
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def _sum_over_ranks(tensor):
    if _world_size() > 1:
        dist.all_reduce(tensor)
    return tensor


class EMACodebook(nn.Module):
    """K code vectors of ``dim`` numbers, learned without gradients.

    Every code is the moving average of the vectors assigned to it (van den Oord et al. 2017, appendix A.1). The first
    training batch places the codes by k-means, and each code starts with an average code's share of that batch, so a
    code that nothing chose keeps its place instead of being divided by almost zero. A code whose moving count falls
    below ``dead_code_threshold`` times the average count is drawn anew from the batch and starts over.

    All state is in buffers, stays in fp32 whatever the model is cast to, and is the same on every rank.

    Args:
        codebook_size: K.
        dim: length of a code vector.
        decay: of the moving averages, per training step.
        eps: Laplace smoothing of the counts.
        kmeans_iters: Lloyd iterations on the first training batch; 0 only draws the codes from it.
        dead_code_threshold: fraction of the average count; 0 never revives a code.
    """

    def __init__(self, codebook_size, dim, decay=0.99, eps=1e-5, kmeans_iters=10, dead_code_threshold=0.1):
        super().__init__()
        self.codebook_size = codebook_size
        self.decay = decay
        self.eps = eps
        self.kmeans_iters = kmeans_iters
        self.dead_code_threshold = dead_code_threshold
        codebook = torch.randn(codebook_size, dim)
        self.register_buffer("codebook", codebook)
        self.register_buffer("cluster_size", torch.ones(codebook_size))
        self.register_buffer("cluster_sum", codebook.clone())
        self.register_buffer("initialized", torch.tensor(False))

    def _apply(self, fn, recurse=True):
        # Follow the model between devices, but stay in fp32 under .half() or .to(torch.bfloat16).
        def keep_dtype(tensor):
            moved = fn(tensor)
            return moved if moved.dtype == tensor.dtype else tensor.to(moved.device)

        return super()._apply(keep_dtype, recurse)

    @torch.no_grad()
    def nearest(self, vectors):
        """Index of the nearest code, by Euclidean distance in fp32: (N, dim) -> (N,) int64."""
        with torch.autocast(vectors.device.type, enabled=False):
            # |x - e|^2 = |x|^2 - 2 x.e + |e|^2. Distances are taken from the codebook's mean, because the expansion
            # cancels badly far from the origin.
            center = self.codebook.mean(0)
            codes = self.codebook - center
            half_norms = codes.square().sum(-1) / 2
            chunks = (vectors.float() - center).split(SEARCH_CHUNK)
            return torch.cat([torch.addmm(half_norms, chunk, codes.T, alpha=-1).argmin(-1) for chunk in chunks])

    def lookup(self, codes):
        """The code vectors of indices: (...) int64 -> (..., dim) fp32."""
        return F.embedding(codes, self.codebook)

    @torch.no_grad()
    def initialize(self, vectors):
        """Place the codes by k-means on the vectors (N, dim) of all ranks."""
        vectors = vectors.float()
        self.codebook.copy_(self._draw(vectors))
        for _ in range(self.kmeans_iters):
            counts, sums = self._statistics(vectors, self.nearest(vectors))
            self.codebook.copy_(torch.where(counts[:, None] > 0, sums / counts[:, None].clamp(min=1), self.codebook))
        n_vectors = _sum_over_ranks(torch.tensor(float(len(vectors)), device=vectors.device))
        self.cluster_size.fill_(n_vectors / self.codebook_size)
        self.cluster_sum.copy_(self.codebook * self.cluster_size[:, None])
        self.initialized.fill_(True)

    @torch.no_grad()
    def update(self, vectors, codes):
        """One step of the moving averages, then revival of dead codes.

        Args:
            vectors: (N, dim) encoder outputs of this rank's batch; N may differ between ranks.
            codes: (N,) int64, the code of each.
        """
        vectors = vectors.float()
        counts, sums = self._statistics(vectors, codes)
        self.cluster_size.lerp_(counts, 1 - self.decay)
        self.cluster_sum.lerp_(sums, 1 - self.decay)
        total = self.cluster_size.sum()
        smoothed = (self.cluster_size + self.eps) / (total + self.codebook_size * self.eps) * total
        self.codebook.copy_(self.cluster_sum / smoothed[:, None])
        if self.dead_code_threshold > 0:
            average = total / self.codebook_size
            dead = (self.cluster_size < self.dead_code_threshold * average)[:, None]
            drawn = self._draw(vectors)
            self.codebook.copy_(torch.where(dead, drawn, self.codebook))
            self.cluster_size.copy_(torch.where(dead[:, 0], average, self.cluster_size))
            self.cluster_sum.copy_(torch.where(dead, drawn * average, self.cluster_sum))

    def _statistics(self, vectors, codes):
        """Per code, the number (K,) and the sum (K, dim) of its vectors on all ranks."""
        finite = vectors.isfinite().all(-1)  # an overflow under fp16 must not poison the averages
        packed = torch.cat([vectors, vectors.new_ones(len(vectors), 1)], -1)
        packed = torch.where(finite[:, None], packed, 0.0)
        sums = vectors.new_zeros(self.codebook_size, packed.shape[-1]).index_add_(0, codes, packed)
        sums = _sum_over_ranks(sums)
        return sums[:, -1], sums[:, :-1]

    def _draw(self, vectors):
        """K vectors from the batches of all ranks, the same on every rank: (N, dim) -> (K, dim)."""
        if len(vectors) >= self.codebook_size:
            rows = torch.randperm(len(vectors), device=vectors.device)[: self.codebook_size]
        else:
            rows = torch.randint(len(vectors), (self.codebook_size,), device=vectors.device)
        drawn = vectors[rows].nan_to_num(0.0, 0.0, 0.0)
        if _world_size() > 1:
            # Each rank supplies every world-size-th row; the sum joins them.
            mine = torch.arange(self.codebook_size, device=drawn.device) % _world_size() == dist.get_rank()
            drawn = _sum_over_ranks(torch.where(mine[:, None], drawn, 0.0))
        return drawn
