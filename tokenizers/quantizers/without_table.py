"""Quantizers without a table of code vectors, from vector-quantize-pytorch: no code can die, nothing is searched."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from diffusers.utils import BaseOutput
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F
from vector_quantize_pytorch import FSQ, LFQ

from latentcast.distributed import rank_and_world
from latentcast.metrics.perplexity import histogram, perplexity
from latentcast.shapes import Scalar

from ..base import mix_rows
from .ema_codebook import KeepsDtype

MOST_CODES = 2**24


@dataclass
class LookupFreeOutput(BaseOutput):
    """What ``forward`` returns.

    latents: fp32, exactly the code vectors; their gradient goes straight through the rounding.
    codes: int64.
    loss: what the quantizer adds to the reconstruction's.
    perplexity: of this batch's codes.
    """

    latents: Float[Tensor, "*rows D"]
    codes: Int[Tensor, "*rows n"]
    loss: Scalar
    perplexity: Float[Tensor, " n"]


class _LookupFreeQuantizer(nn.Module):
    """Around ``library``, a module of vector-quantize-pytorch: any leading axes, and fp32 under any autocast."""

    def __init__(self, library: FSQ | LFQ) -> None:
        super().__init__()
        self.library = library

    @property
    def dim(self) -> int:
        """D, of all codebooks together."""
        return int(self.library.dim)

    @property
    def codebook_sizes(self) -> list[int]:
        return [int(self.library.codebook_size)] * self.library.num_codebooks

    def nearest(self, vectors: Float[Tensor, "*rows D"]) -> Int[Tensor, "*rows n"]:
        """The codes of encoder outputs, int64."""
        return self._run(vectors.detach())[1]

    def lookup(self, codes: Int[Tensor, "*rows n"]) -> Float[Tensor, "*rows D"]:
        """The code vectors, fp32."""
        vectors = self.library.indices_to_codes(codes.flatten(0, -2)[None])
        return vectors[0].float().unflatten(0, codes.shape[:-1])

    def mix(self, weights: Sequence[Float[Tensor, "*rows K"]]) -> Float[Tensor, "*rows D"]:
        """``lookup`` of distributions, one a codebook: their mean code vectors, fp32."""
        n = len(weights)
        codes = torch.arange(self.library.codebook_size, device=weights[0].device)
        tables = self.lookup(codes[:, None].expand(-1, n)).chunk(n, dim=-1)
        return torch.cat([mix_rows(w, table) for w, table in zip(weights, tables)], dim=-1)

    def forward(self, vectors: Float[Tensor, "*rows D"]) -> LookupFreeOutput:
        """Quantise encoder outputs."""
        latents, codes, loss = self._run(vectors)
        histograms = [histogram(c, n) for c, n in zip(codes.flatten(0, -2).T, self.codebook_sizes)]
        return LookupFreeOutput(latents=latents, codes=codes, loss=loss, perplexity=perplexity(torch.stack(histograms)))

    def _run(self, vectors):
        """-> code vectors with their gradient, codes, loss"""
        with torch.autocast(vectors.device.type, enabled=False):
            quantized, codes, *losses = self.library(vectors.float().flatten(0, -2)[None])
        axes = vectors.shape[:-1]
        loss = losses[0] if losses else quantized.new_zeros(())
        codes = codes[0].long().clamp(0, self.library.codebook_size - 1)  # NaN is for the loss to show
        return quantized[0].unflatten(0, axes), codes.unflatten(0, axes), loss


class _BatchNorm(KeepsDtype, nn.BatchNorm1d):
    """Its statistics stay in fp32, as does what it normalises."""


class FiniteScalarQuantizer(_LookupFreeQuantizer):
    """FSQ (Mentzer et al. 2024, section 3): every channel is squashed by tanh and rounded to one of a few levels.

    Args:
        levels: values of each channel of a codebook, 3 to 1000; their product is the number of codes.
        n_codebooks: parts that the channels are split into, each with these levels.
        batch_norm: give every channel mean 0 and variance 1 before tanh (not in the paper): by the batch in ``forward``
            of training, by the running statistics otherwise. Without it a large learning rate, whose first steps move
            all vectors alike, can saturate tanh everywhere: one code is left, and no gradient.
    """

    def __init__(self, levels: Sequence[int], n_codebooks: int = 1, batch_norm: bool = False) -> None:
        if not levels or not 3 <= min(levels) <= max(levels) <= 1000:  # of more the library rounds beyond the last
            raise ValueError(f"levels: expected 3 to 1000 values for every channel, found {list(levels)}")
        if math.prod(levels) > MOST_CODES:
            raise ValueError(f"levels: expected a product of at most {MOST_CODES}, found {list(levels)}")
        if n_codebooks < 1:
            raise ValueError(f"n_codebooks: expected at least 1, found {n_codebooks}")
        super().__init__(FSQ(list(levels), num_codebooks=n_codebooks, keep_num_codebooks_dim=True))
        self.norm = _BatchNorm(self.dim, affine=False) if batch_norm else None

    def nearest(self, vectors: Float[Tensor, "*rows D"]) -> Int[Tensor, "*rows n"]:
        return super().nearest(self._normalised(vectors.detach(), training=False))

    def forward(self, vectors: Float[Tensor, "*rows D"]) -> LookupFreeOutput:
        return super().forward(self._normalised(vectors, self.training))

    def nearest_level(self, vectors: Float[Tensor, "*rows D"]) -> Int[Tensor, "*rows n"]:
        """Like ``nearest``, of vectors in the space of the code vectors, which tanh must not squash again."""
        levels = self.library._levels
        half = levels // 2
        grid = vectors.float().unflatten(-1, (-1, len(levels)))
        grid = (grid * half).round().clamp(-half, levels - 1 - half) / half
        return self.library.codes_to_indices(grid).long()

    def _normalised(self, vectors, training):
        if self.norm is None:
            return vectors
        flat = vectors.float().flatten(0, -2)
        statistics = self.norm.running_mean, self.norm.running_var
        flat = self.norm(flat) if training else F.batch_norm(flat, *statistics, eps=self.norm.eps)
        return flat.unflatten(0, vectors.shape[:-1])


class LookupFreeQuantizer(_LookupFreeQuantizer):
    """LFQ (Yu et al. 2024, section 3.1): a channel is one bit, its sign; code vectors are corners of a cube, -1 and 1.

    In training mode the loss is ``entropy_weight`` times (mean entropy of a vector's code distribution minus
    ``diversity_gamma`` times the entropy of their mean; eq. 6) plus ``commitment_weight`` times the mean square
    distance to the code vectors; in eval mode it is 0. The entropies take memory for every code at every position. With
    several ranks each takes the mean over its own batch; W of them lower the loss by a constant, gamma ln W.

    Args:
        dim: D, channels or bits of all codebooks together.
        n_codebooks: parts that the channels are split into; each has 2^(D / n_codebooks) codes.
    """

    def __init__(
        self,
        dim: int,
        n_codebooks: int = 1,
        entropy_weight: float = 0.1,
        diversity_gamma: float = 1.0,
        commitment_weight: float = 0.25,
    ) -> None:
        if n_codebooks < 1 or dim % n_codebooks:
            raise ValueError(f"n_codebooks: expected a divisor of the {dim} channels, found {n_codebooks}")
        library = LFQ(
            codebook_size=2 ** (dim // n_codebooks),
            num_codebooks=n_codebooks,
            keep_num_codebooks_dim=True,
            entropy_loss_weight=entropy_weight,
            diversity_gamma=diversity_gamma,
            commitment_loss_weight=commitment_weight,
        )
        super().__init__(library)
        self.diversity_gamma = diversity_gamma

    def _run(self, vectors):
        # The library (1.32) divides the mean distribution by the number of ranks, and so its entropy's gradient.
        self.library.diversity_gamma = self.diversity_gamma * rank_and_world()[1]
        return super()._run(vectors)
