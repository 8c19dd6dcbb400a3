"""Residual quantisation with a tree of codes, the quantizer of S-HR-VQVAE (Adiban et al. 2023, section 4.1)."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from latentcast.metrics.perplexity import histogram, perplexity
from latentcast.shapes import Scalar

from .ema_codebook import EMACodebook
from .sliced import QuantizerOutput


@dataclass
class ResidualQuantizerOutput(QuantizerOutput):
    """What ``CodeTree.forward`` returns, beside what every quantizer does.

    commitment_loss: sum_i |xi^(i-1) - sg[e^i]|^2 + |z - sg[e_C]|^2, means for the norms.
    codebook_loss: sum_i |sg[xi^(i-1)] - e^i|^2 + |sg[z] - e_C|^2, or None where moving averages do its work.
    """

    codebook_loss: Scalar | None = None


class CodeTree(nn.Module):
    """Quantises a vector, then what is left of it, n times (S-HR-VQVAE, section 4.1).

    Layer 1 has one codebook of m codes. Layer i has m^(i-1) codebooks of m codes, one for each path of codes above it,
    and compares with the codes of one of them only: n * m comparisons choose one of m^n leaves.

    Without ``tree`` every layer has one codebook whatever the path: residual vector quantisation (Zeghidour et al.
    2021, section III-C), with n * m codes in all.

    In a tree the codes that no vector has reached yet are zero, so that a leaf there, which a prior may choose all the
    same, is what its path above says. When a code is placed or revived, what hung below it described residuals of
    another code; all codebooks below it are zero again, and placed on their next visit.

    In training mode ``forward`` also updates the codebooks; nothing else does. With one layer, codes, latents and
    codebooks are those of ``SlicedQuantizer`` with one codebook, and the commitment loss is twice that one's.

    Args:
        dim: D, the channels.
        n_layers: n.
        codebook_size: m.
        tree: False for residual quantisation without the tree.
        learned: codebooks that learn by gradients, see ``EMACodebook``.
        **codebook: further arguments of ``EMACodebook``.
    """

    def __init__(
        self,
        dim: int,
        n_layers: int = 3,
        codebook_size: int = 16,
        tree: bool = True,
        learned: bool = False,
        **codebook: float | str | bool,
    ) -> None:
        super().__init__()
        if n_layers < 1 or codebook_size < 1:
            raise ValueError(
                f"n_layers, codebook_size: expected at least 1 of each, found {n_layers} and {codebook_size}"
            )
        self.codebook_size = codebook_size
        self.tree = tree
        self.learned = learned
        self.layers = nn.ModuleList(
            EMACodebook(codebook_size, dim, n_parents=codebook_size**i if tree else 1, learned=learned, **codebook)
            for i in range(n_layers)
        )
        if tree and n_layers > 1:
            self._start_over_below(0, torch.ones(codebook_size, dtype=torch.bool))

    @torch.no_grad()
    def nearest(self, vectors: Float[Tensor, "*rows D"]) -> Int[Tensor, "*rows n"]:
        """The codes, int64, greedily from layer to layer."""
        xi, codes = vectors.float().flatten(0, -2), []
        parents = self._root(xi)
        for layer in self.layers:
            column, e, parents = self._choose(layer, xi, parents)
            xi = xi - e
            codes.append(column)
        return torch.stack(codes, -1).unflatten(0, vectors.shape[:-1])

    @torch.no_grad()
    def lookup(self, codes: Int[Tensor, "*rows n"], n_layers: int | None = None) -> Float[Tensor, "*rows D"]:
        """The sum e_C of the code vectors of the first ``n_layers`` layers, by default of all n; fp32.

        Raises:
            ValueError: ``n_layers`` is out of range.
        """
        if n_layers is not None and not 1 <= n_layers <= len(self.layers):
            raise ValueError(f"n_layers: expected 1 to {len(self.layers)}, found {n_layers}")
        total, parents = torch.zeros((), device=codes.device), 0
        for layer, column in zip(self.layers[:n_layers], codes.unbind(-1)):
            rows = parents * self.codebook_size + column
            total = total + layer.lookup(rows)
            parents = rows if self.tree else 0
        return total

    def mix(self, weights: Sequence[Float[Tensor, "*rows K"]]) -> Float[Tensor, "*rows D"]:
        """``lookup`` of distributions over the codes of every layer.

        In a tree the codes of a layer are those below the path of largest weights. The path has no gradient: a weight
        counts by its own layer's code vectors, not by what another path would have below it.
        """
        total = torch.zeros((), device=weights[0].device)
        parents = torch.zeros_like(weights[0][..., 0], dtype=torch.int64)
        for layer, w in zip(self.layers, weights):
            total = total + layer.mix(w, parents)
            if self.tree:
                parents = parents * self.codebook_size + w.argmax(-1)
        return total

    def forward(self, vectors: Float[Tensor, "*rows D"]) -> ResidualQuantizerOutput:
        """Quantise."""
        xi = z = vectors.float().flatten(0, -2)
        e_C, commitment_loss, codebook_loss, parents, steps = 0.0, 0.0, 0.0, self._root(z), []
        for i, layer in enumerate(self.layers):
            if self.training:
                self._start_over_below(i, layer.initialize(xi.detach(), parents))
            column, e, below = self._choose(layer, xi, parents)
            e_C = e_C + e
            commitment_loss = commitment_loss + F.mse_loss(xi, e.detach())
            codebook_loss = codebook_loss + F.mse_loss(xi.detach(), e)
            steps.append((xi.detach(), column, parents))
            # Subtracting the straight-through output would cancel the gradient of all further layers.
            xi, parents = xi - e.detach(), below
        commitment_loss = commitment_loss + F.mse_loss(z, e_C.detach())
        codebook_loss = codebook_loss + F.mse_loss(z.detach(), e_C)
        if self.training:  # only now: a code that is revived takes back what hangs below it
            for i, (layer, step) in enumerate(zip(self.layers, steps)):
                self._start_over_below(i, layer.update(*step))
        codes = torch.stack([column for _, column, _ in steps], -1)
        histograms = [histogram(column, self.codebook_size) for column in codes.unbind(-1)]
        latents = e_C.detach() + (z - z.detach())  # exact values, straight-through gradient
        return ResidualQuantizerOutput(
            latents=latents.unflatten(0, vectors.shape[:-1]),
            codes=codes.unflatten(0, vectors.shape[:-1]),
            commitment_loss=commitment_loss,
            perplexity=perplexity(torch.stack(histograms)),
            codebook_loss=codebook_loss if self.learned else None,
        )

    @staticmethod
    def _root(z):
        """The path above the first layer, of each of z (N, D)."""
        return torch.zeros(len(z), dtype=torch.int64, device=z.device)

    def _choose(self, layer, xi, parents):
        """What a layer chooses for residuals xi^(i-1) (N, D), whose paths are ``parents`` (N,): its codes (N,), their
        vectors e^i (N, D), and the paths of the next layer."""
        column = layer.nearest(xi, parents)
        rows = parents * self.codebook_size + column
        return column, layer.lookup(rows), rows if self.tree else parents

    def _start_over_below(self, i, chosen):
        """Take back all that hangs below the ``chosen`` codes (bool) of layer i."""
        if self.tree and not (chosen.device.type == "cpu" and not chosen.any()):  # the host does not wait for a GPU
            for layer in self.layers[i + 1 :]:
                chosen = layer.clear(chosen)
