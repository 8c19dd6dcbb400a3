"""Convolutions that see only what comes earlier in raster order over (t, h, w)."""

import itertools

import torch
import torch.nn.functional as F
from torch import nn


class CausalConv3d(nn.Conv3d):
    """A "same" 3-D convolution with the taps of every later position masked.

    Mask "A" also hides the current position (for a first layer over the values being predicted), mask "B" shows it.
    The kernel sizes are odd. Input and output are (B, C, t, h, w). The weight keeps its full shape, as in the masked
    convolutions of PixelCNN; masked taps stay untouched.
    """

    def __init__(self, in_channels, out_channels, kernel_size, mask="A", bias=True):
        super().__init__(in_channels, out_channels, kernel_size, bias=bias)
        if mask not in ("A", "B"):
            raise ValueError(f"mask: expected 'A' or 'B', found {mask!r}")
        centre = tuple(size // 2 for size in self.kernel_size)
        offsets = list(itertools.product(*(range(-c, c + 1) for c in centre)))
        visible = [offset < (0, 0, 0) or (mask == "B" and offset == (0, 0, 0)) for offset in offsets]
        self.taps = [offset for offset, seen in zip(offsets, visible) if seen]
        self.register_buffer("mask", torch.tensor(visible).view(1, 1, *self.kernel_size), persistent=False)

    def forward(self, x):
        pt, ph, pw = (size // 2 for size in self.kernel_size)
        pt = min(pt, x.shape[2] - 1)  # taps further back than the clip's first frame meet zeros only
        first = self.kernel_size[0] // 2 - pt
        weight = (self.weight * self.mask)[:, :, first : first + pt + 1]
        if pt == 0:  # frame by frame: a 2-D convolution is much faster
            b, _, t, _, _ = x.shape
            frames = x.transpose(1, 2).flatten(0, 1)
            out = F.conv2d(frames, weight[:, :, 0], self.bias, padding=(ph, pw))
            return out.unflatten(0, (b, t)).transpose(1, 2)
        return F.conv3d(F.pad(x, (0, 0, 0, 0, pt, 0)), weight, self.bias, padding=(0, ph, pw))

    def neighbours(self, grid):
        """Raster index of each visible tap of each position: (N, n_taps) int64; N stands for "outside the grid"."""
        coordinates = torch.cartesian_prod(*(torch.arange(size) for size in grid)).view(-1, 3)
        located = coordinates[:, None] + torch.tensor(self.taps)
        size = torch.tensor(grid)
        inside = ((located >= 0) & (located < size)).all(-1)
        index = (located[..., 0] * grid[1] + located[..., 1]) * grid[2] + located[..., 2]
        return torch.where(inside, index, coordinates.shape[0])

    def tap_weight(self):
        """The visible taps as one matrix (n_taps * in_channels, out_channels), for computing single positions."""
        visible = self.weight.flatten(2)[:, :, self.mask.flatten()]  # (out, in, taps)
        return visible.permute(2, 1, 0).flatten(0, 1)
