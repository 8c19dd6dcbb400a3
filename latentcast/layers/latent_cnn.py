"""Small networks with features at several levels, as SVG's are, for latents of any size instead of frames."""

from collections.abc import Sequence
from itertools import pairwise

from torch import nn

from .multilevel import (
    MultilevelDecoder,
    MultilevelEncoder,
    doubled_widths,
    joined_maps,
    level_shapes,
    n_halvings,
    normalized,
)


class LatentEncoder(MultilevelEncoder):
    """Latents -> the vector, in [-1, 1], and the features of each level, h x w and coarser.

    The first level keeps the size; the sides are then halved as long as they are even and at least 8. Latents of a
    single position have one level.

    Args:
        in_channels: D.
        height, width: h and w, any.
        dim: numbers in the vector.
        hidden_channels: channels of the finest level.
    """

    def __init__(self, in_channels: int, height: int, width: int, dim: int = 128, hidden_channels: int = 64) -> None:
        n = n_halvings(height, width)
        channels = doubled_widths(n + 1, hidden_channels)
        levels = [nn.Sequential(*normalized(same_size(in_channels, channels[0], height, width, bias=False)))]
        for n_in, n_out in pairwise(channels):
            levels.append(nn.Sequential(*normalized(nn.Conv2d(n_in, n_out, 4, stride=2, padding=1, bias=False))))
        last = nn.Conv2d(channels[-1], dim, (height >> n, width >> n), bias=False)
        head = nn.Sequential(*normalized(last, nn.Tanh()))
        super().__init__(levels, head, level_shapes(channels, height, width))


class LatentDecoder(MultilevelDecoder):
    """The vector -> latents, unbounded: the encoder's mirror image.

    Args:
        in_channels, height, width, dim, hidden_channels: as in the encoder.
        joined: maps that each level takes beside its own, as in ``DCGANDecoder``.
    """

    def __init__(
        self,
        in_channels: int,
        height: int,
        width: int,
        dim: int = 128,
        hidden_channels: int = 64,
        joined: int | Sequence[int] = 0,
    ) -> None:
        n = n_halvings(height, width)
        channels = doubled_widths(n + 1, hidden_channels)
        joined = joined_maps(joined, len(channels))
        finest, *others = [c * (1 + extra) for c, extra in zip(channels, joined)]
        hidden = normalized(same_size(finest, channels[0], height, width, bias=False))
        levels = [nn.Sequential(*hidden, same_size(channels[0], in_channels, height, width))]
        for n_in, n_out in zip(others, channels):
            up = nn.ConvTranspose2d(n_in, n_out, 4, stride=2, padding=1, bias=False)
            levels.append(nn.Sequential(*normalized(up)))
        first = nn.ConvTranspose2d(dim, channels[-1], (height >> n, width >> n), bias=False)
        super().__init__(levels, nn.Sequential(*normalized(first)), level_shapes(channels, height, width), joined)


def same_size(n_in: int, n_out: int, height: int, width: int, bias: bool = True) -> nn.Conv2d:
    """A 3x3 convolution; along an axis of length 1, where all neighbours are padding, the kernel has length 1."""
    kernel = tuple(1 if size == 1 else 3 for size in (height, width))
    return nn.Conv2d(n_in, n_out, kernel, padding=tuple(k // 2 for k in kernel), bias=bias)
