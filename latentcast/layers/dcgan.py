"""The DCGAN networks of SVG (Denton and Fergus 2018) and HAF-SVG, which use them for Moving-MNIST.

DCGAN's discriminator and generator (Radford et al. 2016): 4x4 convolutions of stride 2, four of them at 64x64 and five
at 128x128, and one over the 4x4 map that is left. Other than published, frames are in [-1, 1], hence a tanh at the end
where SVG has a sigmoid, and convolutions before a BatchNorm have no bias, which it would cancel.
"""

from collections.abc import Sequence

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


class DCGANEncoder(MultilevelEncoder):
    """Frames -> the vector h, in [-1, 1], and the features of each level, H/2 x W/2 to 4 x 4.

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
        levels = []
        for n_in, n_out in zip([in_channels, *channels], channels):
            levels.append(nn.Sequential(*normalized(nn.Conv2d(n_in, n_out, 4, stride=2, padding=1, bias=False))))
        head = nn.Sequential(*normalized(nn.Conv2d(channels[-1], dim, grid, bias=False), nn.Tanh()))
        super().__init__(levels, head, level_shapes(channels, height, width, first=1))


class DCGANDecoder(MultilevelDecoder):
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
        out = nn.ConvTranspose2d(finest, in_channels, 4, stride=2, padding=1)
        levels = [nn.Sequential(out, final_activation(output_activation))]
        for n_in, n_out in zip(others, channels):
            up = nn.ConvTranspose2d(n_in, n_out, 4, stride=2, padding=1, bias=False)
            levels.append(nn.Sequential(*normalized(up)))
        head = nn.Sequential(*normalized(nn.ConvTranspose2d(dim, channels[-1], grid, bias=False)))
        super().__init__(levels, head, level_shapes(channels, height, width, first=1), joined)
