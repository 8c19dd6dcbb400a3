"""Diagonal Gaussians, as one tensor of moments: mean and log-variance stacked along the channels."""

import math

import torch


def scale_moments(moments, factor, shift=0.0):
    """Moments of ``(x - shift) * factor``: (..., 2 D, h, w) of x -> the same shape."""
    mean, logvar = moments.chunk(2, dim=-3)
    return torch.cat([(mean - shift) * factor, logvar + 2 * math.log(abs(factor))], dim=-3)


def sample_moments(moments, generator=None):
    """One draw: (..., 2 D, h, w) -> (..., D, h, w); gradients reach both moments.

    Args:
        generator: of the noise, on any device; None: torch's own of the moments' device.
    """
    mean, logvar = moments.chunk(2, dim=-3)
    device = moments.device if generator is None else generator.device
    noise = torch.randn(mean.shape, generator=generator, device=device, dtype=mean.dtype).to(moments.device)
    return mean + (0.5 * logvar).exp() * noise


def kl_to_standard_normal(moments):
    """KL(N(mean, exp(logvar)) || N(0, 1)) in nats, summed over D, h and w: (..., 2 D, h, w) -> (...)."""
    return kl_of_numbers(moments).sum((-3, -2, -1))


def kl_of_numbers(moments):
    """The same of each number: (..., 2 D, h, w) -> (..., D, h, w). Kingma and Welling 2014, appendix B."""
    mean, logvar = moments.chunk(2, dim=-3)
    return 0.5 * (mean.square() + logvar.exp() - 1 - logvar)
