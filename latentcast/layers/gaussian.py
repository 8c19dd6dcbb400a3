"""Diagonal Gaussians, as one tensor of moments: mean and log-variance stacked along the channels, 2 D of D numbers."""

import math

import torch
from jaxtyping import Float
from torch import Tensor


def scale_moments(
    moments: Float[Tensor, "*rows moments h w"], factor: float, shift: float = 0.0
) -> Float[Tensor, "*rows moments h w"]:
    """Moments of x -> those of ``(x - shift) * factor``."""
    mean, logvar = moments.chunk(2, dim=-3)
    return torch.cat([(mean - shift) * factor, logvar + 2 * math.log(abs(factor))], dim=-3)


def sample_moments(
    moments: Float[Tensor, "*rows moments h w"], generator: torch.Generator | None = None
) -> Float[Tensor, "*rows moments//2 h w"]:
    """One draw; gradients reach both moments.

    Args:
        generator: of the noise, on any device; None: torch's own of the moments' device.
    """
    mean, logvar = moments.chunk(2, dim=-3)
    device = moments.device if generator is None else generator.device
    noise = torch.randn(mean.shape, generator=generator, device=device, dtype=mean.dtype).to(moments.device)
    return mean + (0.5 * logvar).exp() * noise


def kl_to_standard_normal(moments: Float[Tensor, "*rows moments h w"]) -> Float[Tensor, "*rows"]:
    """KL(N(mean, exp(logvar)) || N(0, 1)) in nats, summed over D, h and w."""
    return kl_of_numbers(moments).sum((-3, -2, -1))


def kl_of_numbers(moments: Float[Tensor, "*rows moments h w"]) -> Float[Tensor, "*rows moments//2 h w"]:
    """The same of each number. Kingma and Welling 2014, appendix B."""
    mean, logvar = moments.chunk(2, dim=-3)
    return 0.5 * (mean.square() + logvar.exp() - 1 - logvar)
