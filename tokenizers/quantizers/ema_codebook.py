"""A codebook that follows its encoder by exponential moving averages: the part that all quantizers share."""

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

from latentcast.config import check_counts
from latentcast.distributed import rank_and_world
from latentcast.metrics.perplexity import histogram

from ..base import mix_rows

# What a search works on at once, which bounds its memory: a CPU should stay in its cache and not start its threads too
# often, a GPU wants few and large kernels. Distances (of at least LEAST vectors), and numbers of code vectors gathered
# for local searches.
SEARCHED_CPU, SEARCHED_GPU, LEAST = 2**20, 2**24, 256
GATHERED_CPU, GATHERED_GPU = 2**17, 2**25


def _sum_over_ranks(tensor):
    if rank_and_world()[1] > 1:
        dist.all_reduce(tensor)
    return tensor


class KeepsDtype(nn.Module):
    """Follows the model between devices, but stays in fp32 under ``.half()`` or ``.to(torch.bfloat16)``."""

    def _apply(self, fn, recurse=True):
        def keep_dtype(tensor):
            moved = fn(tensor)
            return moved if moved.dtype == tensor.dtype else tensor.to(moved.device)

        return super()._apply(keep_dtype, recurse)


class Later:
    """A bool that a GPU finds out and the host reads when it is long there; other work goes on meanwhile."""

    def __init__(self, found):
        self.found, self.there = found.to("cpu", non_blocking=True), torch.cuda.Event()
        self.there.record()

    def __bool__(self):
        self.there.synchronize()
        return bool(self.found)

    def __deepcopy__(self, memo):
        """Nothing is known of a copy."""


class EMACodebook(KeepsDtype):
    """K code vectors of ``dim`` numbers, learned without gradients; or K for each of P parents.

    Every code is the moving average of the vectors assigned to it (van den Oord et al. 2017, appendix A.1). The first
    training batch places the codes by k-means, and each code starts with an average code's share of that batch, so a
    code that nothing chose keeps its place instead of being divided by almost zero. A code whose moving count falls
    below ``dead_code_threshold`` times the average count is drawn anew from the batch and starts over.

    With ``n_parents``, a vector belongs to a parent and is compared with the K codes of that parent alone. All of the
    above happens for each parent by itself, with the vectors routed to it; a batch that does not visit a parent leaves
    its codes and counts as they are, bit for bit. Code c of parent p is row p * K + c of all tensors. On a GPU, where
    the host would have to wait to know what a batch visits, a parent's codes are placed by the batch after the one that
    visited it first.

    All state stays in fp32 whatever the model is cast to, and is the same on every rank. While ``revives`` is False no
    code is drawn anew: a revived one jumps, and the moving average of the weights follows it only slowly.

    Args:
        codebook_size: K.
        dim: length of a code vector.
        decay: of the moving averages, per training step.
        eps: Laplace smoothing of the counts.
        kmeans_iters: Lloyd iterations on the first training batch; 0 only draws the codes from it.
        dead_code_threshold: fraction of the average count; 0 never revives a code.
        n_parents: P; None: a codebook by itself, whose methods need no ``parents``.
        learned: the codes are a parameter, for a loss and an optimiser to move; the moving averages then only count.
        init: "data", the first training batch places the codes, as above; or "uniform", as the published code of the
            Latent Video Transformer begins: in +-1 / K, with counts of 0, so that what the first batches do not choose
            is divided by almost nothing and lost far away.
    Raises:
        ValueError: a codebook without codes, or a decay outside [0, 1).
    """

    def __init__(
        self,
        codebook_size,
        dim,
        decay=0.99,
        eps=1e-5,
        kmeans_iters=10,
        dead_code_threshold=0.1,
        n_parents=None,
        learned=False,
        init="data",
    ):
        super().__init__()
        check_counts(codebook_size=codebook_size)
        if init not in ("data", "uniform"):
            raise ValueError(f"codebook_init: expected data or uniform, found {init!r}")
        if not 0 <= decay < 1:
            raise ValueError(f"ema_decay: expected at least 0 and below 1, found {decay}")
        self.codebook_size = codebook_size
        self.n_parents = n_parents or 1
        self.decay = decay
        self.eps = eps
        self.kmeans_iters = kmeans_iters
        self.dead_code_threshold = dead_code_threshold
        self.learned = learned
        self.revives = True
        self._placed = False  # True: all codes are known to be, so that the host need not ask the device
        self._found = None  # a Later: whether the batch before visited parents that are not placed
        n_codes = self.n_parents * codebook_size
        uniform = init == "uniform"
        codebook = torch.randn(n_codes, dim)
        if uniform:
            codebook.uniform_(-1 / codebook_size, 1 / codebook_size)
        if learned:
            self.codebook = nn.Parameter(codebook)
        else:
            self.register_buffer("codebook", codebook)
            self.register_buffer("cluster_sum", codebook.clone())
        self.register_buffer("cluster_size", torch.full((n_codes,), 0.0 if uniform else 1.0))
        self.register_buffer("initialized", torch.full(() if n_parents is None else (n_parents,), uniform))

    @torch.no_grad()
    def nearest(self, vectors, parents=None):
        """Number of the nearest code among a parent's K, by Euclidean distance in fp32.

        Args:
            vectors: (N, dim).
            parents: (N,) int64 in [0, P).
        Returns:
            (N,) int64 in [0, K).
        """
        with torch.autocast(vectors.device.type, enabled=False):
            search = self._nearest_of_all if self.n_parents == 1 else self._nearest_of_children
            return search(vectors.float(), parents)

    def _nearest_of_all(self, vectors, _):
        # |x - e|^2 = |x|^2 - 2 x.e + |e|^2. Distances are taken from the codebook's mean, because the expansion cancels
        # badly far from the origin.
        center = self.codebook.mean(0)
        codes = self.codebook - center
        half_norms = codes.square().sum(-1) / 2
        size = max(LEAST, _at_once(codes.device, SEARCHED_CPU, SEARCHED_GPU) // len(codes))
        found = torch.empty(len(vectors), dtype=torch.int64, device=codes.device)
        distances = half_norms.new_empty(min(size, len(vectors)), len(codes))  # one for all: fresh memory is slow
        for x, nearest in zip(vectors.split(size), found.split(size)):
            nearest.copy_(_argmin(torch.addmm(half_norms, x - center, codes.T, alpha=-1, out=distances[: len(x)])))
        return found

    def _nearest_of_children(self, vectors, parents):
        families = self.codebook.unflatten(0, (self.n_parents, self.codebook_size))
        rows = families.flatten(1)  # selecting long rows is several times as fast as indexing the three axes
        chunk = max(1, _at_once(rows.device, GATHERED_CPU, GATHERED_GPU) // rows.shape[1])
        found = []
        for x, p in zip(vectors.split(chunk), parents.split(chunk)):
            children = rows.index_select(0, p).unflatten(1, families.shape[1:])
            distances = torch.cdist(x[:, None], children, compute_mode="donot_use_mm_for_euclid_dist")
            found.append(distances[:, 0].argmin(-1))
        return torch.cat(found)

    def lookup(self, rows):
        """The code vectors in these rows, which are the codes where there is one parent: (...) int64 -> (..., dim)
        fp32."""
        return F.embedding(rows, self.codebook)

    def mix(self, weights, parents=None):
        """Weighted sums of a parent's codes, by which gradients reach the weights.

        Args:
            weights: (..., K).
            parents: (...) int64 in [0, P).
        Returns:
            (..., dim) fp32.
        """
        if self.n_parents == 1:
            return mix_rows(weights, self.codebook)
        # A bag of K rows for each position; gathering them instead would keep K vectors a position for the gradient.
        flat = weights.float().flatten(0, -2)
        sums = F.embedding_bag(self._rows(parents.flatten()), self.codebook, mode="sum", per_sample_weights=flat)
        return sums.unflatten(0, parents.shape)

    @torch.no_grad()
    def initialize(self, vectors, parents=None):
        """Place the codes of those parents that are visited for the first time.

        Args:
            vectors: (N, dim) of this rank's batch; N may differ between ranks.
            parents: (N,) int64, the parent of each.
        Returns:
            which codes were placed, (P * K,) bool, the same on every rank.
        """
        placed = torch.zeros(len(self.codebook), dtype=torch.bool, device=vectors.device)
        if not self._placed and not self._all_at_once(placed.device):
            self._placed = bool(self.initialized.all())
        if self._placed:
            return placed
        vectors, slots, ids, visits = self._route(vectors, parents, ~self.initialized)
        K, rows, seen = self.codebook_size, self._rows(ids), visits[:, None] > 0
        if not self._visited(visits):
            return placed
        drawn, n_drawn = self._draw(vectors, slots, len(ids))
        # With fewer vectors than codes, some codes repeat a vector.
        repeated = torch.arange(K, device=rows.device) % n_drawn[:, None].clamp(min=1)
        drawn = drawn.gather(1, repeated[..., None].expand_as(drawn))
        self.codebook[rows] = torch.where(seen[..., None], drawn, self.codebook[rows])
        for _ in range(self.kmeans_iters):
            counts, sums = self._statistics(
                vectors, slots, self.nearest(vectors, ids[slots.clamp(max=len(ids) - 1)]), len(ids)
            )
            means = sums / counts[..., None].clamp(min=1)
            self.codebook[rows] = torch.where(counts[..., None] > 0, means, self.codebook[rows])
        seen = seen.expand_as(rows)
        sizes = (visits.float() / K)[:, None].expand_as(rows)
        self._set_counts(rows, torch.where(seen, sizes, self.cluster_size[rows]), seen)
        self.initialized.view(-1)[ids] |= seen[:, 0]
        self._placed = self.n_parents == 1  # then it is the one that was visited
        placed[rows] = seen
        return placed

    @torch.no_grad()
    def update(self, vectors, codes, parents=None):
        """One step of the moving averages of the parents visited, then revival of their dead codes.

        Args:
            vectors: (N, dim) of this rank's batch; N may differ between ranks.
            codes: (N,) int64 in [0, K), the code of each.
            parents: (N,) int64, the parent of each.
        Returns:
            which codes were revived, (P * K,) bool, the same on every rank. The host never waits for a GPU to know.
        """
        vectors, slots, ids, visits = self._route(vectors, parents, self.initialized)
        K, rows, seen = self.codebook_size, self._rows(ids), visits[:, None] > 0
        counts, sums = self._statistics(vectors, slots, codes, len(ids))
        before = self.cluster_size[rows]
        sizes = torch.where(seen, before.lerp(counts, 1 - self.decay), before)
        self.cluster_size[rows] = sizes
        totals = sizes.sum(-1, keepdim=True)
        if not self.learned:
            before, codebook = self.cluster_sum[rows], self.codebook[rows]
            moved = before.lerp(sums, 1 - self.decay)
            smoothed = (sizes + self.eps) / (totals + K * self.eps) * totals
            self.cluster_sum[rows] = torch.where(seen[..., None], moved, before)
            self.codebook[rows] = torch.where(seen[..., None], moved / smoothed[..., None], codebook)
        revived = torch.zeros(len(self.codebook), dtype=torch.bool, device=rows.device)
        dead = (sizes < self.dead_code_threshold * totals / K) & seen
        if not self.revives or not self.dead_code_threshold:
            return revived
        if dead.device.type == "cpu" and not torch.compiler.is_compiling() and not dead.any():  # would break the graph
            return revived
        drawn, n_drawn = self._draw(vectors, slots, len(ids))
        # Where a parent has a vector for each of its codes, code c takes the c-th. Where it has fewer, its first dead
        # codes take them, and the others wait for a later batch: two codes on one vector would not both live.
        turn = torch.where(n_drawn[:, None] == K, torch.arange(K, device=rows.device), dead.cumsum(-1) - 1)
        dead &= turn < n_drawn[:, None]
        fresh = drawn.gather(1, turn.clamp(min=0)[..., None].expand_as(drawn))
        self.codebook[rows] = torch.where(dead[..., None], fresh, self.codebook[rows])
        self._set_counts(rows, torch.where(dead, totals / K, sizes), dead)
        revived[rows] = dead
        return revived

    @torch.no_grad()
    def clear(self, parents):
        """Take the codes of some parents, (P,) bool, back: all are zero until ``initialize`` places them.

        Returns:
            which codes these are, (P * K,) bool.
        """
        rows = parents.repeat_interleave(self.codebook_size)
        self.codebook.masked_fill_(rows[:, None], 0)
        self.cluster_size.masked_fill_(rows, 1)
        if not self.learned:
            self.cluster_sum.masked_fill_(rows[:, None], 0)
        self.initialized.masked_fill_(parents.view_as(self.initialized), False)
        self._placed = False
        return rows

    def _all_at_once(self, device):
        """Whether all parents are gone through, visited or not: where the host would wait to know which are."""
        return self.n_parents > 1 and device.type != "cpu"

    def _visited(self, visits):
        """Whether some parent that is not placed is visited; of several on a GPU, whether it was by the batch before,
        and True for the first one."""
        found = visits.any()
        if not self._all_at_once(found.device):
            return bool(found)
        placing = self._found is None or bool(self._found)
        self._found = False if placing else Later(found)  # of those that are placed now nothing is left
        return placing

    def _load_from_state_dict(self, *args):
        self._placed, self._found = False, None
        super()._load_from_state_dict(*args)

    def _set_counts(self, rows, sizes, chosen):
        """Start the moving averages of the ``chosen`` codes in ``rows`` as if each had been chosen ``sizes`` times a
        batch so far."""
        self.cluster_size[rows] = sizes
        if not self.learned:
            sums = self.codebook[rows] * sizes[..., None]
            self.cluster_sum[rows] = torch.where(chosen[..., None], sums, self.cluster_sum[rows])

    def _rows(self, ids):
        """Rows of the codes of some parents: (A,) -> (A, K)."""
        return ids[:, None] * self.codebook_size + torch.arange(self.codebook_size, device=ids.device)

    def _route(self, vectors, parents, wanted):
        """What this batch brings to the parents in ``wanted`` (P,) bool, without vectors that overflowed under fp16.

        Returns:
            vectors (N, dim) fp32; slots (N,), for each vector the place of its parent in ids, or A where it does not
            count; ids (A,), the wanted parents that some rank visits, or all there are: the only one, and on a GPU;
            visits (A,), their vectors on all ranks, 0 of those that are not wanted.
        """
        if parents is None:
            parents = torch.zeros(len(vectors), dtype=torch.int64, device=vectors.device)
        keep = vectors.isfinite().all(-1) & wanted.view(-1)[parents]
        vectors = torch.where(keep[:, None], vectors, 0).float()
        visits = _sum_over_ranks(histogram(parents, self.n_parents, keep))
        every = self.n_parents == 1 or self._all_at_once(parents.device)
        ids = torch.arange(self.n_parents, device=parents.device) if every else visits.nonzero()[:, 0]
        slot_of = torch.zeros_like(visits)
        slot_of[ids] = torch.arange(len(ids), device=ids.device)
        return vectors, torch.where(keep, slot_of[parents], len(ids)), ids, visits[ids]

    def _statistics(self, vectors, slots, codes, n_slots):
        """For each code of A parents, the number (A, K) and the sum (A, K, dim) of its vectors on all ranks."""
        K = self.codebook_size
        packed = torch.cat([vectors, vectors.new_ones(len(vectors), 1)], -1)
        sums = vectors.new_zeros((n_slots + 1) * K, packed.shape[-1]).index_add_(0, slots * K + codes, packed)
        sums = _sum_over_ranks(sums[: n_slots * K]).unflatten(0, (n_slots, K))
        return sums[..., -1], sums[..., :-1]

    def _draw(self, vectors, slots, n_slots):
        """Up to K different vectors of each of A parents, the same on every rank.

        Returns:
            drawn (A, K, dim), and how many of the K are filled (A,).
        """
        K, device = self.codebook_size, vectors.device
        order = torch.randperm(len(vectors), device=device)
        order = order[slots[order].argsort(stable=True)]  # shuffled within each parent
        slots = slots[order]
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
