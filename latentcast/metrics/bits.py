"""Bits per dimension of priors with a likelihood."""

import math
from collections.abc import Sequence

from jaxtyping import Float
from torch import Tensor


def bits_per_dim(log_prob: Float[Tensor, " B"], shape: Sequence[int]) -> Float[Tensor, " B"]:
    """-log2 of the likelihood, in nats, per predicted dimension: bits.

    Of a prior over discrete codes, ``shape`` (T, h, w, n_codebooks), it is bits per latent code: what the Latent Video
    Transformer reports as bits/dim, and no likelihood of pixels. Of a prior over 256-level pixels, ``shape``
    (T, C, H, W), it is bits per pixel and channel. The two do not compare.

    Args:
        log_prob: ``prior.log_prob(clip, n_context)``, of all that was predicted.
        shape: of what was predicted of one clip, without the context.
    """
    dims = math.prod(shape)
    if dims < 1:
        raise ValueError(f"bits per dimension: expected predicted dimensions, found shape {tuple(shape)}")
    return -log_prob / (dims * math.log(2))
