"""Convolutions that see only what comes earlier in raster order over (t, h, w), or along one of these axes."""

import itertools
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float, Int, Shaped
from torch import Tensor, nn


class CausalConv3d(nn.Conv3d):
    """A "same" 3-D convolution with the taps of every later position masked.

    Mask "A" also hides the current position (for a first layer over the values being predicted), mask "B" shows it.
    The kernel sizes are odd. The weight keeps its full shape, as in the masked convolutions of PixelCNN; masked taps
    stay untouched.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, int, int],
        mask: str = "A",
        bias: bool = True,
    ) -> None:
        super().__init__(in_channels, out_channels, kernel_size, bias=bias)
        if mask not in ("A", "B"):
            raise ValueError(f"mask: expected 'A' or 'B', found {mask!r}")
        centre = tuple(size // 2 for size in self.kernel_size)
        offsets = list(itertools.product(*(range(-c, c + 1) for c in centre)))
        visible = [offset < (0, 0, 0) or (mask == "B" and offset == (0, 0, 0)) for offset in offsets]
        self.taps = [offset for offset, seen in zip(offsets, visible) if seen]
        places = [place for place, seen in enumerate(visible) if seen]
        self.register_buffer("mask", torch.tensor(visible).view(1, 1, *self.kernel_size), persistent=False)
        self.register_buffer("visible", torch.tensor(places, dtype=torch.int64), persistent=False)

    def forward(self, input: Float[Tensor, "B C t h w"]) -> Float[Tensor, "B out t h w"]:
        pt, ph, pw = (size // 2 for size in self.kernel_size)
        pt = min(pt, input.shape[2] - 1)  # taps further back than the clip's first frame meet zeros only
        first = self.kernel_size[0] // 2 - pt
        weight = (self.weight * self.mask)[:, :, first : first + pt + 1]
        if pt == 0:  # frame by frame: a 2-D convolution is much faster
            frames = rearrange(input, "b c t h w -> (b t) c h w")
            out = F.conv2d(frames, weight[:, :, 0], self.bias, padding=(ph, pw))
            return rearrange(out, "(b t) c h w -> b c t h w", t=input.shape[2])
        return F.conv3d(F.pad(input, (0, 0, 0, 0, pt, 0)), weight, self.bias, padding=(0, ph, pw))

    def neighbours(self, grid: Sequence[int]) -> Int[Tensor, "N taps"]:
        """Raster index of each visible tap of each of N positions; N stands for "outside the grid"."""
        coordinates = torch.cartesian_prod(*(torch.arange(size) for size in grid)).view(-1, 3)
        located = coordinates[:, None] + torch.tensor(self.taps)
        size = torch.tensor(grid)
        inside = ((located >= 0) & (located < size)).all(-1)
        index = (located[..., 0] * grid[1] + located[..., 1]) * grid[2] + located[..., 2]
        return torch.where(inside, index, coordinates.shape[0])

    def tap_weight(self) -> Float[Tensor, "taps_in out"]:
        """The visible taps as one matrix from all of their channels, for computing single positions."""
        visible = self.weight.flatten(2).index_select(2, self.visible)  # (out, in, taps)
        return rearrange(visible, "o i taps -> (taps i) o")


class AxisCausalConv3d(nn.Module):
    """A convolution over (t, h, w), channels last, that is causal along one axis.

    Along ``axis`` (0: t, 1: h, 2: w) it sees this position and the ``taps`` - 1 before it; along the axes after that,
    ``width`` positions around this one; along those before it, this position alone. Three stacks of them, one for each
    axis, whose inputs are shifted by one along their axis (``shifted``), together see whatever is earlier in raster
    order: earlier frames, earlier rows of the frame, earlier columns of the row. So there is no blind spot, which a
    stack of masked convolutions has.

    Args:
        in_channels, out_channels: of the convolution.
        axis, taps, width: see above; ``width`` is odd.
        condition_channels: of a second input, seen at this position and around it along the axes after ``axis``.
    """

    def __init__(
        self, in_channels: int, out_channels: int, axis: int, taps: int, width: int, condition_channels: int = 0
    ) -> None:
        super().__init__()
        self.dim, self.taps, self.in_channels = 1 + axis, taps, in_channels
        kernel = tuple(width if axis < later else 1 for later in (1, 2))
        padding = tuple(size // 2 for size in kernel)
        # The taps along the axis lie side by side in the channels: what remains is an ordinary 2-D convolution.
        self.conv = nn.Conv2d(taps * in_channels + condition_channels, out_channels, kernel, padding=padding)

    def forward(
        self,
        x: Float[Tensor, "B t h w C"],
        condition: Float[Tensor, "B t h w conditions"] | None = None,
        past: Float[Tensor, "B _ _ _ C"] | None = None,
    ) -> tuple[Float[Tensor, "B t h w out"], Float[Tensor, "B _ _ _ C"]]:
        """The convolution, and what to pass as ``past`` of the next piece.

        Args:
            x: the whole grid, or a piece of it along ``axis``.
            condition: the second input.
            past: the ``taps`` - 1 positions before ``x`` along ``axis``; None where the grid begins: zeros.
        """
        length, reach = x.shape[self.dim], self.taps - 1
        if past is None:
            shape = list(x.shape)
            shape[self.dim] = reach
            past = x.new_zeros(shape)
        x = torch.cat([past, x], self.dim)
        seen = [x.narrow(self.dim, offset, length) for offset in range(self.taps)]
        y = torch.cat(seen if condition is None else [*seen, condition], -1)
        if self.conv.kernel_size == (1, 1):
            y = F.linear(y, self.conv.weight[:, :, 0, 0], self.conv.bias)
        else:
            maps = self.conv(rearrange(y, "b t h w c -> (b t) c h w"))
            y = rearrange(maps, "(b t) c h w -> b t h w c", b=y.shape[0], t=y.shape[1])  # t may be 0
        return y, x.narrow(self.dim, length, reach)

    def split_weight(self) -> tuple[Float[Tensor, "taps_in out"], Float[Tensor, "conditions out"]]:
        """The weight of a convolution along the last axis, as matrices: of the taps, and of the condition."""
        weight = self.conv.weight[:, :, 0, 0].t()
        return weight[: self.taps * self.in_channels], weight[self.taps * self.in_channels :]


def shifted(x: Shaped[Tensor, "B t h w *C"], axis: int) -> Shaped[Tensor, "B t h w *C"]:
    """x, moved on by one position along ``axis`` (0: t, 1: h, 2: w), with zeros at the start."""
    dim = 1 + axis
    return torch.cat([torch.zeros_like(x.narrow(dim, 0, 1)), x.narrow(dim, 0, x.shape[dim] - 1)], dim)
