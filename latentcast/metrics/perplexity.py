"""Histograms of codes, and their perplexity."""

import torch
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor


def histogram(codes: Int[Tensor, " N"], size: int, counted: Bool[Tensor, " N"] | None = None) -> Int[Tensor, " {size}"]:
    """How often each of ``size`` codes occurs in ``codes``, int64; only where ``counted``.

    ``torch.bincount`` would make the host wait for a GPU, to see the least and the largest of them.
    """
    ones = torch.ones_like(codes) if counted is None else counted.to(codes.dtype)
    return codes.new_zeros(size).scatter_add_(0, codes, ones)


def perplexity(counts: Shaped[Tensor, "*rows K"]) -> Float[Tensor, "*rows"]:
    """exp(entropy in nats) of the histograms ``counts``, from 1 to K; 1 for an empty one."""
    counts = counts.float()  # whole numbers would be divided in torch's default dtype, which may be a half one
    probabilities = counts / counts.sum(-1, keepdim=True).clamp(min=1)
    return torch.special.entr(probabilities).sum(-1).exp()
