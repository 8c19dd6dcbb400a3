"""Perplexity of a histogram."""

import torch


def perplexity(counts):
    """exp(entropy in nats) of the histograms ``counts`` (..., K) -> (...) float, from 1 to K; 1 for an empty one."""
    counts = counts.float()  # whole numbers would be divided in torch's default dtype, which may be a half one
    probabilities = counts / counts.sum(-1, keepdim=True).clamp(min=1)
    return torch.special.entr(probabilities).sum(-1).exp()
