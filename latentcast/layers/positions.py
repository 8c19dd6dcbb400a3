"""Position encodings over a (t, h, w) grid: fixed sinusoids, rotations and learned relative biases."""

import math
from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn


def sinusoidal_positions_3d(grid: Sequence[int], dim: int) -> Float[Tensor, "N dim"]:
    """Sinusoids of the three coordinates, concatenated, of the N = t h w positions in raster order.

    Each axis gets ``dim // 6`` frequencies from 1 down to 1/10,000; the remainder of ``dim`` stays zero.
    """
    n = dim // 6
    frequencies = 10000 ** -(torch.arange(n, dtype=torch.float32) / max(n, 1))
    axes = torch.meshgrid(*(torch.arange(size, dtype=torch.float32) for size in grid), indexing="ij")
    angles = torch.stack(axes, -1).flatten(0, 2)[..., None] * frequencies  # (N, 3, n)
    encoding = torch.cat([angles.sin(), angles.cos()], -1).flatten(1)
    return nn.functional.pad(encoding, (0, dim - encoding.shape[1]))


def rotate(
    x: Float[Tensor, "*rows e"], cos: Float[Tensor, "*#rows e"], sin: Float[Tensor, "*#rows e"]
) -> Float[Tensor, "*rows e"]:
    """Rotate pairs of channels by cosines and signed sines of ``rotation_table``."""
    return torch.addcmul(x * cos, x.roll(x.shape[-1] // 2, -1), sin)


def rotation_table(
    grid: Sequence[int], head_dim: int, longest: float = 100.0, start: int = 0, device: torch.device | str | None = None
) -> Float[Tensor, "N 2 e"]:
    """Cosines and signed sines of the rotation at every position of ``grid``, in raster order.

    Channels j and j + head_dim / 2 are a pair; pair j turns with axis j mod 3, at frequencies from 1 down to
    1 / ``longest`` radians a position. A rotated vector is ``x * cos + x.roll(head_dim // 2, -1) * sin``. The first
    axis is counted from ``start`` on.
    """
    half = head_dim // 2
    pair = torch.arange(half, device=device)
    per_axis = math.ceil(half / 3)
    frequencies = longest ** -((pair // 3) / max(per_axis - 1, 1))
    ends = zip((start, 0, 0), grid)
    axes = [torch.arange(first, first + size, dtype=torch.float32, device=device) for first, size in ends]
    coordinates = torch.cartesian_prod(*axes).view(-1, 3)
    angles = coordinates[:, pair % 3] * frequencies  # (N, half)
    cos, sin = angles.cos(), angles.sin()
    return torch.stack([torch.cat([cos, cos], -1), torch.cat([-sin, sin], -1)], 1)


class RelativeBias3D(nn.Module):
    """Attention bias B = B_t[dt] + B_h[dh] + B_w[dw], one learned table per axis and head, zero at the start.

    ``scale`` multiplies the tables: under Adam it multiplies their learning rate, which lets short runs form sharp
    attention.

    ``forward()`` is of the N = t h w positions: entry [m, q, k] is added to the logit of query q, key k in head m.
    """

    def __init__(self, grid: Sequence[int], n_heads: int, scale: float = 1.0) -> None:
        super().__init__()
        self.grid, self.scale = tuple(grid), scale
        self.tables = nn.ParameterList(nn.Parameter(torch.zeros(n_heads, 2 * size - 1)) for size in self.grid)

    def forward(self) -> Float[Tensor, "heads N N"]:
        bias = 0
        for axis, (size, table) in enumerate(zip(self.grid, self.tables)):
            index = torch.arange(size, device=table.device)
            per_axis = table[:, index[:, None] - index + size - 1]  # (heads, size, size)
            shape = [-1, 1, 1, 1, 1, 1, 1]
            shape[1 + axis], shape[4 + axis] = size, size
            bias = bias + self.scale * per_axis.view(shape)
        n = self.grid[0] * self.grid[1] * self.grid[2]
        return bias.reshape(-1, n, n)
