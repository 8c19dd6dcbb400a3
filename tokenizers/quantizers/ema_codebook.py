"""A codebook that follows its encoder by exponential moving averages: the part that all quantizers share."""

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from latentcast.config import check_counts

from ..base import mix_rows
from .routing import Later, RoutedBatch
from .search import nearest_of_all, nearest_of_children


class KeepsDtype(nn.Module):
    """Follows the model between devices, but stays in fp32 under ``.half()`` or ``.to(torch.bfloat16)``."""

    def _apply(self, fn, recurse=True):
        def keep_dtype(tensor):
            moved = fn(tensor)
            return moved if moved.dtype == tensor.dtype else tensor.to(moved.device)

        return super()._apply(keep_dtype, recurse)


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
        codebook_size: int,
        dim: int,
        decay: float = 0.99,
        eps: float = 1e-5,
        kmeans_iters: int = 10,
        dead_code_threshold: float = 0.1,
        n_parents: int | None = None,
        learned: bool = False,
        init: str = "data",
    ) -> None:
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
    def nearest(self, vectors: Float[Tensor, "N dim"], parents: Int[Tensor, " N"] | None = None) -> Int[Tensor, " N"]:
        """Number of the nearest code among a parent's K, by Euclidean distance in fp32.

        Args:
            parents: int64 in [0, P).
        Returns:
            int64 in [0, K).
        """
        with torch.autocast(vectors.device.type, enabled=False):
            if self.n_parents == 1:
                return nearest_of_all(vectors.float(), self.codebook)
            families = self.codebook.unflatten(0, (self.n_parents, self.codebook_size))
            return nearest_of_children(vectors.float(), families, parents)

    def lookup(self, rows: Int[Tensor, "*rows"]) -> Float[Tensor, "*rows dim"]:
        """The code vectors in these rows, which are the codes where there is one parent; fp32."""
        return F.embedding(rows, self.codebook)

    def mix(
        self, weights: Float[Tensor, "*rows K"], parents: Int[Tensor, "*rows"] | None = None
    ) -> Float[Tensor, "*rows dim"]:
        """Weighted sums of a parent's codes, fp32, by which gradients reach the weights."""
        if self.n_parents == 1:
            return mix_rows(weights, self.codebook)
        # A bag of K rows for each position; gathering them instead would keep K vectors a position for the gradient.
        flat = weights.float().flatten(0, -2)
        rows = parents.flatten()[:, None] * self.codebook_size + torch.arange(self.codebook_size, device=parents.device)
        sums = F.embedding_bag(rows, self.codebook, mode="sum", per_sample_weights=flat)
        return sums.unflatten(0, parents.shape)

    @torch.no_grad()
    def initialize(
        self, vectors: Float[Tensor, "N dim"], parents: Int[Tensor, " N"] | None = None
    ) -> Bool[Tensor, " PK"]:
        """Place the codes of those parents that are visited for the first time.

        Args:
            vectors: of this rank's batch; N may differ between ranks.
            parents: of each.
        Returns:
            which codes were placed, the same on every rank.
        """
        placed = torch.zeros(len(self.codebook), dtype=torch.bool, device=vectors.device)
        if not self._placed and self._host_asks(placed.device):
            self._placed = bool(self.initialized.all())
        if self._placed:
            return placed
        batch = self._route(vectors, parents, ~self.initialized)
        if not self._visited(batch.visits):
            return placed
        self._k_means(batch)
        rows, seen = batch.rows, batch.seen.expand_as(batch.rows)
        sizes = (batch.visits.float() / self.codebook_size)[:, None].expand_as(rows)
        self._start_averages(rows, torch.where(seen, sizes, self.cluster_size[rows]), seen)
        self.initialized.view(-1)[batch.ids] |= batch.seen[:, 0]
        self._placed = self.n_parents == 1  # then it is the one that was visited
        placed[rows] = seen
        return placed

    def _k_means(self, batch):
        """Place the codes of the parents that the batch visits: K of their vectors, then Lloyd's iterations."""
        rows, seen, (drawn, n_drawn) = batch.rows, batch.seen, batch.draw()
        # With fewer vectors than codes, some codes repeat a vector.
        repeated = torch.arange(self.codebook_size, device=rows.device) % n_drawn[:, None].clamp(min=1)
        drawn = drawn.gather(1, repeated[..., None].expand_as(drawn))
        self.codebook[rows] = torch.where(seen[..., None], drawn, self.codebook[rows])
        parents = batch.ids[batch.slots.clamp(max=len(batch.ids) - 1)]
        for _ in range(self.kmeans_iters):
            counts, sums = batch.statistics(self.nearest(batch.vectors, parents))
            means = sums / counts[..., None].clamp(min=1)
            self.codebook[rows] = torch.where(counts[..., None] > 0, means, self.codebook[rows])

    @torch.no_grad()
    def update(
        self, vectors: Float[Tensor, "N dim"], codes: Int[Tensor, " N"], parents: Int[Tensor, " N"] | None = None
    ) -> Bool[Tensor, " PK"]:
        """One step of the moving averages of the parents visited, then revival of their dead codes.

        Args:
            vectors: of this rank's batch; N may differ between ranks.
            codes: of each, in [0, K).
            parents: of each.
        Returns:
            which codes were revived, the same on every rank. The host never waits for a GPU to know.
        """
        batch = self._route(vectors, parents, self.initialized)
        self._average(batch, *batch.statistics(codes))
        revived = torch.zeros(len(self.codebook), dtype=torch.bool, device=batch.rows.device)
        if self.revives and self.dead_code_threshold:
            self._revive(batch, revived)
        return revived

    def _average(self, batch, n, sums):
        """The rule of van den Oord et al. 2017, appendix A.1, for n vectors (A, K) and their sum (A, K, dim) a code:

            N <- decay N + (1 - decay) n,    m <- decay m + (1 - decay) sum,    e <- m / N,

        with N smoothed: as many vectors in all, but none of no code.
        """
        rows, seen, rate = batch.rows, batch.seen, 1 - self.decay
        N = self.cluster_size[rows]
        N = torch.where(seen, N.lerp(n, rate), N)
        self.cluster_size[rows] = N
        if self.learned:
            return
        m, e, total = self.cluster_sum[rows], self.codebook[rows], N.sum(-1, keepdim=True)
        moved = m.lerp(sums, rate)
        smoothed = (N + self.eps) / (total + self.codebook_size * self.eps) * total
        self.cluster_sum[rows] = torch.where(seen[..., None], moved, m)
        self.codebook[rows] = torch.where(seen[..., None], moved / smoothed[..., None], e)

    def _revive(self, batch, revived):
        """Draw the dead codes of the parents visited anew from the batch, and mark them in ``revived``."""
        rows, K, sizes = batch.rows, self.codebook_size, self.cluster_size[batch.rows]
        totals = sizes.sum(-1, keepdim=True)
        dead = (sizes < self.dead_code_threshold * totals / K) & batch.seen
        if dead.device.type == "cpu" and not torch.compiler.is_compiling() and not dead.any():  # would break the graph
            return
        drawn, n_drawn = batch.draw()
        # Where a parent has a vector for each of its codes, code c takes the c-th. Where it has fewer, its first dead
        # codes take them, and the others wait for a later batch: two codes on one vector would not both live.
        turn = torch.where(n_drawn[:, None] == K, torch.arange(K, device=rows.device), dead.cumsum(-1) - 1)
        dead &= turn < n_drawn[:, None]
        fresh = drawn.gather(1, turn.clamp(min=0)[..., None].expand_as(drawn))
        self.codebook[rows] = torch.where(dead[..., None], fresh, self.codebook[rows])
        self._start_averages(rows, torch.where(dead, totals / K, sizes), dead)
        revived[rows] = dead

    @torch.no_grad()
    def clear(self, parents: Bool[Tensor, " P"]) -> Bool[Tensor, " PK"]:
        """Take the codes of some parents back -> which codes these are. All are zero until ``initialize`` places
        them."""
        rows = parents.repeat_interleave(self.codebook_size)
        self.codebook.masked_fill_(rows[:, None], 0)
        self.cluster_size.masked_fill_(rows, 1)
        if not self.learned:
            self.cluster_sum.masked_fill_(rows[:, None], 0)
        self.initialized.masked_fill_(parents.view_as(self.initialized), False)
        self._placed = False
        return rows

    def _host_asks(self, device):
        """Whether the host looks which parents are visited and placed: of several on a GPU it would wait to know."""
        return self.n_parents == 1 or device.type == "cpu"

    def _visited(self, visits):
        """Whether some parent that is not placed is visited; of several on a GPU, whether it was by the batch before,
        and True for the first one."""
        found = visits.any()
        if self._host_asks(found.device):
            return bool(found)
        placing = self._found is None or bool(self._found)
        self._found = False if placing else Later(found)  # of those that are placed now nothing is left
        return placing

    def _load_from_state_dict(self, *args, **kwargs):
        self._placed, self._found = False, None
        super()._load_from_state_dict(*args, **kwargs)

    def _start_averages(self, rows, sizes, chosen):
        """Start the moving averages of the ``chosen`` codes in ``rows`` as if each had been chosen ``sizes`` times a
        batch so far."""
        self.cluster_size[rows] = sizes
        if not self.learned:
            sums = self.codebook[rows] * sizes[..., None]
            self.cluster_sum[rows] = torch.where(chosen[..., None], sums, self.cluster_sum[rows])

    def _route(self, vectors, parents, wanted):
        return RoutedBatch(vectors, parents, wanted.view(-1), self.codebook_size)
