"""The VGG16 networks of SVG (Denton and Fergus 2018) and HAF-SVG, which use them for KTH and BAIR.

The convolutions of VGG16 (Simonyan and Zisserman 2015) with BatchNorm: 2, 2, 3 and 3 of them at 64x64, three more at
128x128, max-pooling in between, nearest-neighbour upsampling in the decoder. Other than published, frames are in
[-1, 1], hence a tanh at the end where SVG has a sigmoid, and convolutions before a BatchNorm have no bias, which it
would cancel.
"""

from collections.abc import Sequence
from itertools import pairwise

from torch import nn

from .multilevel import (
    MultilevelDecoder,
    MultilevelEncoder,
    final_activation,
    joined_maps,
    level_shapes,
    level_widths,
    normalized,
)


class VGGEncoder(MultilevelEncoder):
    """Frames -> the vector h, in [-1, 1], and the features of each level, H x W to 8 x 8.

    Args:
        in_channels: C.
        height, width: H and W in pixels, even; see ``level_widths``.
        dim: numbers in h.
        hidden_channels: channels of the finest level.
    """

    def __init__(
        self, in_channels: int = 3, height: int = 64, width: int = 64, dim: int = 128, hidden_channels: int = 64
    ) -> None:
        channels, grid = level_widths(height, width, hidden_channels)
        levels, n_in = [], in_channels
        for i, n_out in enumerate(channels):
            pool = [nn.MaxPool2d(2)] if i else []
            levels.append(nn.Sequential(*pool, *block(n_in, *[n_out] * n_convolutions(i))))
            n_in = n_out
        head = nn.Sequential(nn.MaxPool2d(2), *normalized(nn.Conv2d(n_in, dim, grid, bias=False), nn.Tanh()))
        super().__init__(levels, head, level_shapes(channels, height, width))


class VGGDecoder(MultilevelDecoder):
    """The vector h -> frames: the encoder's mirror image.

    Args:
        in_channels, height, width, dim, hidden_channels: as in the encoder.
        joined: maps of the size of the encoder's features that each level takes beside its own: 0 none, 1 for the skip
            connections of SVG, 2 for the feature aligner of HAF-SVG; a number for all levels or a list, fine to coarse.
        output_activation: "tanh" or "linear", of the frames.
    """

    def __init__(
        self,
        in_channels: int = 3,
        height: int = 64,
        width: int = 64,
        dim: int = 128,
        hidden_channels: int = 64,
        joined: int | Sequence[int] = 0,
        output_activation: str = "tanh",
    ) -> None:
        channels, grid = level_widths(height, width, hidden_channels)
        joined = joined_maps(joined, len(channels))
        finest, *others = [n * (1 + extra) for n, extra in zip(channels, joined)]
        out = nn.ConvTranspose2d(channels[0], in_channels, 3, padding=1)
        levels = [nn.Sequential(*block(finest, channels[0]), out, final_activation(output_activation))]
        for i, (n_in, n_out) in enumerate(zip(others, channels), start=1):
            widths = [channels[i]] * (n_convolutions(i) - 1)
            levels.append(nn.Sequential(*block(n_in, *widths, n_out), nn.Upsample(scale_factor=2)))
        bottom = nn.ConvTranspose2d(dim, channels[-1], grid, bias=False)
        head = nn.Sequential(*normalized(bottom), nn.Upsample(scale_factor=2))
        super().__init__(levels, head, level_shapes(channels, height, width), joined)


def block(*widths: int) -> list[nn.Module]:
    """3x3 convolutions from width to width, each with BatchNorm and activation."""
    layers = []
    for n_in, n_out in pairwise(widths):
        layers += normalized(nn.Conv2d(n_in, n_out, 3, padding=1, bias=False))
    return layers


def n_convolutions(level: int) -> int:
    return 2 if level < 2 else 3
