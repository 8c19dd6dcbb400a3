"""Sliced vector quantisation: the channels are split, each part has a codebook of its own."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from diffusers.utils import BaseOutput
from jaxtyping import Float, Int
from torch import Tensor, nn

from latentcast.metrics.perplexity import histogram, perplexity
from latentcast.shapes import Scalar

from .ema_codebook import EMACodebook


@dataclass
class QuantizerOutput(BaseOutput):
    """What a quantizer's ``forward`` returns.

    latents: fp32, exactly the code vectors; their gradient goes straight through to the input.
    codes: int64.
    commitment_loss: mean over all elements of (input - sg[code vector])^2.
    perplexity: of this batch's codes.
    """

    latents: Float[Tensor, "*rows D"]
    codes: Int[Tensor, "*rows n"]
    commitment_loss: Scalar
    perplexity: Float[Tensor, " n"]


class SlicedQuantizer(nn.Module):
    """Splits D channels into ``n_codebooks`` parts and quantises each with its own codebook (Latent Video Transformer,
    section 3.1, "Decomposed Vector Quantization"); ``n_codebooks=1`` is the plain VQ-VAE.

    In training mode ``forward`` also updates the codebooks; nothing else does.

    Args:
        dim: D, the channels that are split.
        n_codebooks: number of parts.
        codebook_size: number of codes in EACH codebook.
        **codebook: further arguments of ``EMACodebook``.
    """

    def __init__(
        self, dim: int, n_codebooks: int = 1, codebook_size: int = 512, **codebook: float | str | bool
    ) -> None:
        super().__init__()
        if n_codebooks < 1 or dim % n_codebooks:
            raise ValueError(f"n_codebooks: expected a divisor of the {dim} channels, found {n_codebooks}")
        self.codebook_size = codebook_size
        self.codebooks = nn.ModuleList(
            EMACodebook(codebook_size, dim // n_codebooks, **codebook) for _ in range(n_codebooks)
        )

    def nearest(self, vectors: Float[Tensor, "*rows D"]) -> Int[Tensor, "*rows n"]:
        """The nearest code of each part, int64."""
        codes = torch.stack([codebook.nearest(part) for codebook, part in self._parts(vectors)], dim=-1)
        return codes.unflatten(0, vectors.shape[:-1])

    def lookup(self, codes: Int[Tensor, "*rows n"]) -> Float[Tensor, "*rows D"]:
        """The code vectors, fp32."""
        first = torch.arange(len(self.codebooks), device=codes.device) * self.codebook_size
        table = torch.cat([codebook.codebook for codebook in self.codebooks])
        return F.embedding(codes + first, table).flatten(-2)

    def mix(self, weights: Sequence[Float[Tensor, "*rows K"]]) -> Float[Tensor, "*rows D"]:
        """``lookup`` of distributions, one a codebook: their mean code vectors, fp32."""
        return torch.cat([codebook.mix(w) for codebook, w in zip(self.codebooks, weights)], dim=-1)

    def forward(self, vectors: Float[Tensor, "*rows D"]) -> QuantizerOutput:
        """Quantise."""
        vectors = vectors.float()
        if self.training:
            for codebook, part in self._parts(vectors.detach()):
                codebook.initialize(part)
        codes = self.nearest(vectors)
        quantized = self.lookup(codes)
        columns = codes.flatten(0, -2).unbind(-1)
        if self.training:
            for (codebook, part), column in zip(self._parts(vectors.detach()), columns):
                codebook.update(part, column)
        histograms = [histogram(column, self.codebook_size) for column in columns]
        return QuantizerOutput(
            latents=quantized + (vectors - vectors.detach()),  # exact values, straight-through gradient
            codes=codes,
            commitment_loss=F.mse_loss(vectors, quantized),
            perplexity=perplexity(torch.stack(histograms)),
        )

    def _parts(self, vectors):
        """Every codebook with its part of the channels, flattened to (N, D / n_codebooks)."""
        return zip(self.codebooks, vectors.flatten(0, -2).chunk(len(self.codebooks), dim=-1))
