"""Tables and softmaxes that spend fewer numbers on rare codes (Latent Video Transformer, appendix A)."""

from collections.abc import Sequence
from itertools import pairwise

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

SHRINK = 4  # each cluster has codes so much narrower than the one before: Baevski and Auli 2019, section 3


def cluster_bounds(size: int, cutoffs: Sequence[int] | None = None) -> list[int]:
    """[0, c_1, ..., K]: the codes, most frequent first, up to each of which a cluster goes.

    Args:
        size: K. cutoffs: c_1, ..., increasing within 1 to K - 1; None: one, the paper's 218 of 512 codes, which have
            80 % of the probability there.
    Raises:
        ValueError: cutoffs that are no such numbers.
    """
    bounds = [0, *([max(1, round(size * 218 / 512))] if cutoffs is None else cutoffs), size]
    if not all(isinstance(bound, int) and not isinstance(bound, bool) for bound in bounds) or any(
        low >= high for low, high in pairwise(bounds)
    ):
        raise ValueError(f"cutoffs: expected increasing whole numbers from 1 to {size - 1}, found {cutoffs}")
    return bounds


def _sizes_and_widths(bounds, dim):
    return [(high - low, max(1, dim // SHRINK**i)) for i, (low, high) in enumerate(pairwise(bounds))]


class AdaptiveTable(nn.Module):
    """Adaptive input (Baevski and Auli 2019): vectors of K codes, narrower and projected from cluster to cluster.

    ``forward()`` gives the whole table (K, dim), row c for code c. ``rank`` (K,), the place of every code from the most
    frequent on, is a saved buffer: the order of the codes until it is set.

    Args:
        bounds: of ``cluster_bounds``. dim: of the vectors. std: of their numbers at the start.
    """

    def __init__(self, bounds: Sequence[int], dim: int, std: float = 1.0) -> None:
        super().__init__()
        clusters = _sizes_and_widths(bounds, dim)
        self.embeddings = nn.ModuleList(nn.Embedding(size, width) for size, width in clusters)
        self.projections = nn.ModuleList(nn.Linear(width, dim, bias=False) for _, width in clusters)
        for embedding, projection in zip(self.embeddings, self.projections):
            nn.init.normal_(embedding.weight, std=std)
            nn.init.normal_(projection.weight, std=embedding.embedding_dim**-0.5)
        self.register_buffer("rank", torch.arange(bounds[-1]))

    def forward(self) -> Float[Tensor, "K dim"]:
        ordered = [project(part.weight) for part, project in zip(self.embeddings, self.projections)]
        return torch.cat(ordered)[self.rank]


class AdaptiveSoftmax(nn.Module):
    """Adaptive softmax (Grave et al. 2017): features -> log-probabilities of K codes, their own logits.

    The first cluster and one entry for each other share a softmax; a code of another cluster has its entry's
    probability times that within the cluster.

    Args:
        in_channels: of the features.
        bounds: of ``cluster_bounds``.
        table: with the same bounds; its vectors are the codes' output weights too ("tied emb"). Not registered here, it
            belongs to the input.
        dim: with a table, the width of its rows.
        tie_projections: take its projections, too ("tied emb/proj").
    """

    def __init__(
        self,
        in_channels: int,
        bounds: Sequence[int],
        table: AdaptiveTable | None = None,
        dim: int | None = None,
        tie_projections: bool = False,
    ) -> None:
        super().__init__()
        self.bounds, self._table, self.tie_projections = bounds, [table], tie_projections
        n_tails = len(bounds) - 2
        self.register_buffer("rank", torch.arange(bounds[-1]))
        if table is None:
            (first, _), *tails = _sizes_and_widths(bounds, in_channels)
            self.head = nn.Linear(in_channels, first + n_tails, bias=False)
            self.tails = nn.ModuleList(
                nn.Sequential(nn.Linear(in_channels, width, bias=False), nn.Linear(width, size, bias=False))
                for size, width in tails
            )
            return
        self.clusters = nn.Linear(in_channels, n_tails, bias=False)
        widths = [dim] if tie_projections else [part.embedding_dim for part in table.embeddings]
        self.reduce = nn.ModuleList(nn.Linear(in_channels, width, bias=False) for width in widths)

    def forward(self, x: Float[Tensor, "*rows in_channels"]) -> Float[Tensor, "*rows K"]:
        head, tails = self._logits(x)
        head = head.float().log_softmax(-1)
        first = self.bounds[1]
        parts = [head[..., :first]]
        parts += [head[..., first + i, None] + tail.float().log_softmax(-1) for i, tail in enumerate(tails)]
        return torch.cat(parts, -1)[..., self.rank]

    def _logits(self, x):
        """Of the head, and of the codes of each tail."""
        if self._table[0] is None:
            return self.head(x), [tail(x) for tail in self.tails]
        table = self._table[0]
        if self.tie_projections:
            reduced = [F.linear(self.reduce[0](x), projection.weight.T) for projection in table.projections]
        else:
            reduced = [reduce(x) for reduce in self.reduce]
        # Table rows are of unit size, which as weights would be far too large for the wide clusters.
        words = [
            F.linear(part, embedding.weight) * embedding.embedding_dim**-0.5
            for part, embedding in zip(reduced, table.embeddings)
        ]
        return torch.cat([words[0], self.clusters(x)], -1), words[1:]


class TiedSoftmax(nn.Module):
    """Logits by the codes' input vectors.

    Args:
        in_channels: of the features.
        embedding: of all codes; not registered here, it belongs to the input. rows: of it, those that count.
    """

    def __init__(self, in_channels: int, embedding: nn.Embedding, rows: slice) -> None:
        super().__init__()
        self._embedding, self.rows = [embedding], rows
        self.reduce = nn.Linear(in_channels, embedding.embedding_dim)

    def forward(self, x: Float[Tensor, "*rows in_channels"]) -> Float[Tensor, "*rows K"]:
        embedding = self._embedding[0]
        return F.linear(self.reduce(x), embedding.weight[self.rows]) * embedding.embedding_dim**-0.5
