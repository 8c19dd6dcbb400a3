"""Residual quantisation with a tree of codes, the quantizer of S-HR-VQVAE (Adiban et al. 2023, section 4.1)."""

from dataclasses import dataclass

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

from latentcast.metrics.perplexity import perplexity

from .ema_codebook import EMACodebook, _sum_over_ranks, _world_size
from .sliced import QuantizerOutput

# Numbers of gathered code vectors at once, which bounds the memory of a search: on a CPU they should fit in its cache,
# a GPU wants few and large kernels.
GATHERED_CPU, GATHERED_GPU = 2**20, 2**25


class CodebookFamily(EMACodebook):
    """One layer of the tree: a codebook of m codes for each of P parents.

    A vector belongs to a parent and is compared with the m codes of that parent alone. Code c of parent p is row
    p * m + c of all tensors, and that row is the parent's number for the layer below. With one parent this is
    ``EMACodebook``.

    What ``EMACodebook`` does for its codes happens for each parent by itself: its codes are placed by k-means on the
    first batch that visits it, follow the vectors routed to it, and are drawn anew from these when they die. A batch
    that does not visit a parent leaves its codes and counts as they are, bit for bit.

    Args:
        n_parents: P.
        codebook_size: m.
        dim: length of a code vector.
        learned: the codes are a parameter, for a loss and an optimiser to move; the moving averages then only count.
        **codebook: further arguments of ``EMACodebook``.
    """

    def __init__(self, n_parents, codebook_size, dim, learned=False, **codebook):
        super().__init__(n_parents * codebook_size, dim, **codebook)
        self.n_parents = n_parents
        self.n_children = codebook_size
        self.learned = learned
        self.initialized = torch.zeros(n_parents, dtype=torch.bool)
        if learned:
            codes = self._buffers.pop("codebook")
            self.codebook = nn.Parameter(codes)
            del self.cluster_sum

    @torch.no_grad()
    def nearest(self, vectors, parents):
        """Number of the nearest code among a parent's m, by Euclidean distance in fp32.

        Args:
            vectors: (N, dim).
            parents: (N,) int64 in [0, P).
        Returns:
            (N,) int64 in [0, m).
        """
        if self.n_parents == 1:
            return super().nearest(vectors)
        families = self.codebook.unflatten(0, (self.n_parents, self.n_children))
        rows = families.flatten(1)  # selecting long rows is several times as fast as indexing the three axes
        chunk = max(1, (GATHERED_CPU if rows.device.type == "cpu" else GATHERED_GPU) // rows.shape[1])
        found = []
        for x, p in zip(vectors.float().split(chunk), parents.split(chunk)):
            children = rows.index_select(0, p).unflatten(1, families.shape[1:])
            distances = torch.cdist(x[:, None], children, compute_mode="donot_use_mm_for_euclid_dist")
            found.append(distances[:, 0].argmin(-1))
        return torch.cat(found)

    @torch.no_grad()
    def initialize(self, vectors, parents):
        """Place the codes of those parents that are visited for the first time.

        Args:
            vectors: (N, dim) of this rank's batch; N may differ between ranks.
            parents: (N,) int64, the parent of each.
        Returns:
            the rows that were placed, the same on every rank.
        """
        vectors, _, slots, ids, visits = self._route(vectors, parents, ~self.initialized)
        m, rows = self.n_children, self._rows(ids)
        if len(ids) == 0:
            return rows.flatten()
        drawn, n_drawn = self._draw(vectors, slots, len(ids))
        # With fewer vectors than codes, some codes repeat a vector.
        repeated = torch.arange(m, device=rows.device) % n_drawn[:, None]
        self.codebook[rows] = drawn.gather(1, repeated[..., None].expand_as(drawn))
        for _ in range(self.kmeans_iters):
            counts, sums = self._statistics(vectors, slots, self.nearest(vectors, ids[slots]), len(ids))
            means = sums / counts[..., None].clamp(min=1)
            self.codebook[rows] = torch.where(counts[..., None] > 0, means, self.codebook[rows])
        self._set_counts(rows, (visits / m)[:, None].expand_as(rows))
        self.initialized[ids] = True
        return rows.flatten()

    @torch.no_grad()
    def update(self, vectors, parents, codes):
        """One step of the moving averages of the parents visited, then revival of their dead codes.

        Args:
            vectors: (N, dim) of this rank's batch; N may differ between ranks.
            parents: (N,) int64, the parent of each.
            codes: (N,) int64 in [0, m), the code of each.
        Returns:
            the rows that were revived, the same on every rank.
        """
        vectors, codes, slots, ids, _ = self._route(vectors, parents, self.initialized, codes)
        m, rows = self.n_children, self._rows(ids)
        counts, sums = self._statistics(vectors, slots, codes, len(ids))
        sizes = self.cluster_size[rows].lerp_(counts, 1 - self.decay)
        self.cluster_size[rows] = sizes
        totals = sizes.sum(-1, keepdim=True)
        if not self.learned:
            self.cluster_sum[rows] = self.cluster_sum[rows].lerp_(sums, 1 - self.decay)
            smoothed = (sizes + self.eps) / (totals + m * self.eps) * totals
            self.codebook[rows] = self.cluster_sum[rows] / smoothed[..., None]
        dead = sizes < self.dead_code_threshold * totals / m
        if not dead.any():
            return rows[dead]
        drawn, n_drawn = self._draw(vectors, slots, len(ids))
        # Where a parent has a vector for each of its codes, code c takes the c-th. Where it has fewer, its first dead
        # codes take them, and the others wait for a later batch: two codes on one vector would not both live.
        turn = torch.where(n_drawn[:, None] == m, torch.arange(m, device=rows.device), dead.cumsum(-1) - 1)
        dead &= turn < n_drawn[:, None]
        slot = dead.nonzero()[:, 0]
        revived = rows[dead]
        self.codebook[revived] = drawn[slot, turn[dead]]
        self._set_counts(revived, (totals / m)[slot, 0])
        return revived

    def _set_counts(self, rows, sizes):
        """Start the moving averages of codes as if each had been chosen ``sizes`` times a batch so far."""
        self.cluster_size[rows] = sizes
        if not self.learned:
            self.cluster_sum[rows] = self.codebook[rows] * sizes[..., None]

    def _rows(self, ids):
        """Rows of the codes of some parents: (A,) -> (A, m)."""
        return ids[:, None] * self.n_children + torch.arange(self.n_children, device=ids.device)

    def _route(self, vectors, parents, wanted, codes=None):
        """What this batch brings to the parents in ``wanted`` (P,) bool, without vectors that overflowed under fp16.

        Returns:
            vectors (N', dim) fp32 and their codes (or None); slots (N',), for each vector the place of its parent in
            ids; ids (A,), the wanted parents that some rank visits; visits (A,), their vectors on all ranks.
        """
        keep = vectors.isfinite().all(-1) & wanted[parents]
        vectors, parents = vectors[keep].float(), parents[keep]
        visits = _sum_over_ranks(torch.bincount(parents, minlength=self.n_parents))
        ids = visits.nonzero()[:, 0]
        slot_of = torch.zeros_like(visits)
        slot_of[ids] = torch.arange(len(ids), device=ids.device)
        return vectors, None if codes is None else codes[keep], slot_of[parents], ids, visits[ids]

    def _statistics(self, vectors, slots, codes, n_slots):
        """For each code of A parents, the number (A, m) and the sum (A, m, dim) of its vectors on all ranks."""
        packed = torch.cat([vectors, vectors.new_ones(len(vectors), 1)], -1)
        sums = vectors.new_zeros(n_slots * self.n_children, packed.shape[-1])
        sums = _sum_over_ranks(sums.index_add_(0, slots * self.n_children + codes, packed))
        sums = sums.unflatten(0, (n_slots, self.n_children))
        return sums[..., -1], sums[..., :-1]

    def _draw(self, vectors, slots, n_slots):
        """Up to m different vectors of each of A parents, the same on every rank.

        Returns:
            drawn (A, m, dim), and how many of the m are filled (A,).
        """
        m, device = self.n_children, vectors.device
        order = torch.randperm(len(vectors), device=device)
        order = order[slots[order].argsort(stable=True)]  # shuffled within each parent
        slots = slots[order]
        counts = torch.bincount(slots, minlength=n_slots)
        turn = torch.arange(len(order), device=device) - (counts.cumsum(0) - counts)[slots]
        # Ranks take turns. A vector's place is the number of vectors before it: of each rank those with a lower turn,
        # and of lower ranks the one with the same turn.
        rank = dist.get_rank() if _world_size() > 1 else 0
        ranks = torch.arange(_world_size(), device=device)[:, None]
        counts = _sum_over_ranks(torch.where(ranks == rank, counts, 0))
        places = torch.minimum(counts[:, slots], turn + (ranks < rank)).sum(0)
        taken = places < m
        drawn = vectors.new_zeros(n_slots, m, vectors.shape[-1])
        drawn[slots[taken], places[taken]] = vectors[order[taken]]
        return _sum_over_ranks(drawn), counts.sum(0).clamp(max=m)


@dataclass
class ResidualQuantizerOutput(QuantizerOutput):
    """What ``CodeTree.forward`` returns, beside what every quantizer does.

    commitment_loss: scalar, sum_i |xi^(i-1) - sg[e^i]|^2 + |z - sg[e_C]|^2, means for the norms.
    codebook_loss: scalar, sum_i |sg[xi^(i-1)] - e^i|^2 + |sg[z] - e_C|^2, or None where moving averages do its work.
    """

    codebook_loss: torch.Tensor | None = None


class CodeTree(nn.Module):
    """Quantises a vector, then what is left of it, n times (S-HR-VQVAE, section 4.1).

    Layer 1 has one codebook of m codes. Layer i has m^(i-1) codebooks of m codes, one for each path of codes above it,
    and compares with the codes of one of them only: n * m comparisons choose one of m^n leaves.

    Without ``tree`` every layer has one codebook whatever the path: residual vector quantisation (Zeghidour et al.
    2021, section III-C), with n * m codes in all.

    When a code is placed or revived, what hung below it described residuals of another code; the codebooks below it
    start over on their next visit.

    In training mode ``forward`` also updates the codebooks; nothing else does. With one layer, codes, latents and
    codebooks are those of ``SlicedQuantizer`` with one codebook, and the commitment loss is twice that one's.

    Args:
        dim: D, the channels.
        n_layers: n.
        codebook_size: m.
        tree: False for residual quantisation without the tree.
        learned: codebooks that learn by gradients, see ``CodebookFamily``.
        **codebook: further arguments of ``EMACodebook``.
    """

    def __init__(self, dim, n_layers=3, codebook_size=16, tree=True, learned=False, **codebook):
        super().__init__()
        if n_layers < 1 or codebook_size < 1:
            raise ValueError(
                f"n_layers, codebook_size: expected at least 1 of each, found {n_layers} and {codebook_size}"
            )
        self.codebook_size = codebook_size
        self.tree = tree
        self.learned = learned
        self.layers = nn.ModuleList(
            CodebookFamily(codebook_size**i if tree else 1, codebook_size, dim, learned, **codebook)
            for i in range(n_layers)
        )

    @torch.no_grad()
    def nearest(self, vectors):
        """Greedily, from layer to layer: (..., D) -> codes (..., n) int64."""
        rows = [rows for _, _, rows, _ in self._descend(vectors.flatten(0, -2))]
        return (torch.stack(rows, -1) % self.codebook_size).unflatten(0, vectors.shape[:-1])

    @torch.no_grad()
    def lookup(self, codes, n_layers=None):
        """The sum e_C of the code vectors of the first ``n_layers`` layers, by default of all.

        Args:
            codes: (..., n) int64.
            n_layers: 1 to n, or None.
        Returns:
            (..., D) fp32.
        Raises:
            ValueError: ``n_layers`` is out of range.
        """
        if n_layers is not None and not 1 <= n_layers <= len(self.layers):
            raise ValueError(f"n_layers: expected 1 to {len(self.layers)}, found {n_layers}")
        total, parents = 0.0, 0
        for layer, column in zip(self.layers[:n_layers], codes.unbind(-1)):
            rows = parents * self.codebook_size + column
            total = total + layer.lookup(rows)
            parents = rows if self.tree else 0
        return total

    def forward(self, vectors):
        """Quantise (..., D) -> ResidualQuantizerOutput."""
        z = vectors.float().flatten(0, -2)
        e_C, commitment_loss, codebook_loss, steps = 0.0, 0.0, 0.0, []
        for layer, xi, rows, e in self._descend(z, place=self.training):
            e_C = e_C + e
            commitment_loss = commitment_loss + F.mse_loss(xi, e.detach())
            codebook_loss = codebook_loss + F.mse_loss(xi.detach(), e)
            steps.append((layer, xi.detach(), rows))
        commitment_loss = commitment_loss + F.mse_loss(z, e_C.detach())
        codebook_loss = codebook_loss + F.mse_loss(z.detach(), e_C)
        if self.training:
            for i, (layer, xi, rows) in enumerate(steps):
                parents, column = rows // self.codebook_size, rows % self.codebook_size
                self._start_over_below(i, layer.update(xi, parents, column))
        codes = torch.stack([rows for _, _, rows in steps], -1) % self.codebook_size
        histograms = [torch.bincount(column, minlength=self.codebook_size) for column in codes.unbind(-1)]
        latents = e_C.detach() + (z - z.detach())  # exact values, straight-through gradient
        return ResidualQuantizerOutput(
            latents=latents.unflatten(0, vectors.shape[:-1]),
            codes=codes.unflatten(0, vectors.shape[:-1]),
            commitment_loss=commitment_loss,
            perplexity=perplexity(torch.stack(histograms)),
            codebook_loss=codebook_loss if self.learned else None,
        )

    def _descend(self, z, place=False):
        """For z (N, D), yield of each layer: itself, the residual xi^(i-1) that it gets (N, D), the rows that it
        chooses (N,), and their code vectors e^i (N, D). With ``place``, it first places codes that have no place yet.
        """
        xi = z.float()
        parents = torch.zeros(len(xi), dtype=torch.int64, device=xi.device)
        for i, layer in enumerate(self.layers):
            if place:
                self._start_over_below(i, layer.initialize(xi.detach(), parents))
            rows = parents * self.codebook_size + layer.nearest(xi, parents)
            e = layer.lookup(rows)
            yield layer, xi, rows, e
            # Subtracting the straight-through output would cancel the gradient of all further layers.
            xi = xi - e.detach()
            if self.tree:
                parents = rows

    def _start_over_below(self, i, rows):
        if self.tree and i + 1 < len(self.layers):
            self.layers[i + 1].initialized[rows] = False
