"""Causal self-attention over (t, h, w) within windows, with rotary positions and a key/value cache."""

import math
from collections.abc import Sequence

import torch
from einops import rearrange, repeat
from jaxtyping import Float, Int
from torch import Tensor, nn

from ..sizes import nearest_divisors
from .attention import attention
from .positions import rotate, rotation_table


class CausalWindowAttention(nn.Module):
    """Pre-norm multi-head self-attention over a clip, in which a position sees itself and earlier ones of its window.

    Windows tile the clip, and "earlier" is raster order over (t, h, w). One window over everything is full attention; a
    window for each frame is attention in space and one for each (y, x) attention in time.

    Queries and keys are rotated by their coordinates (RoPE, Su et al. 2021; the pairs of channels take turns over the
    three axes), so that attention depends on distances.

    Args:
        dim: channels of input and output.
        n_heads, head_dim: heads and their width, which is even.
        grid: (T, h, w); clips may have fewer frames.
        window: (height, width) of a window; they divide h and w.
        over_time: windows reach over all frames; False: a window has one frame.
    Raises:
        ValueError: sizes that do not fit.
    """

    def __init__(
        self, dim: int, n_heads: int, head_dim: int, grid: Sequence[int], window: Sequence[int], over_time: bool = True
    ) -> None:
        super().__init__()
        if any(size < 1 or whole % size for size, whole in zip(window, grid[1:])):
            frame, nearest = tuple(grid[1:]), nearest_divisors(grid[1:], window)
            raise ValueError(
                f"window: expected divisors of (h, w) = {frame}, found {tuple(window)}; the nearest are {nearest}"
            )
        if head_dim < 2 or head_dim % 2:
            raise ValueError(f"head_dim: expected an even number, found {head_dim}")
        self.n_heads, self.window, self.over_time = n_heads, tuple(window), over_time
        remembered = grid[0] if over_time else 1  # frames
        self.window_length = remembered * math.prod(window)
        self.n_slots = remembered * math.prod(grid[1:])
        self.norm = nn.LayerNorm(dim)
        self.to_qkv = nn.Linear(dim, 3 * n_heads * head_dim, bias=False)
        self.to_out = nn.Linear(n_heads * head_dim, dim, bias=False)
        # A slot is a place in the cache, where each window lies in one piece. Raster index -> slot:
        order = self._to_windows(torch.arange(math.prod(grid)).view(1, *grid, 1, 1)).flatten()
        self.register_buffer("slots", order.argsort() % self.n_slots, persistent=False)
        rotation = rotation_table(grid, head_dim)
        self.register_buffer("rotation", rotation, persistent=False)  # (N, 2, e)
        # For single steps, of query, key and value at once: the value stays as it is.
        identity = torch.tensor([1.0, 0.0]).view(2, 1).expand_as(rotation)
        step_rotation = torch.stack([rotation, rotation, identity], 2)
        self.register_buffer("step_rotation", step_rotation, persistent=False)  # (N, 2, 3, e)

    def _to_windows(self, x):
        """(B, t, h, w, heads, e) -> (B * windows, heads, positions of a window, e)."""
        height, width = self.window
        t = x.shape[1] if self.over_time else 1
        return rearrange(x, "b (f t) (a h) (c w) m e -> (b f a c) m (t h w) e", t=t, h=height, w=width)

    def _from_windows(self, x, shape):
        """(B * windows, heads, positions of a window, e) -> (B, t, h, w, heads * e), the first four being ``shape``."""
        b, frames, rows, _ = shape
        height, width = self.window
        sizes = {"b": b, "f": 1 if self.over_time else frames, "a": rows // height, "h": height, "w": width}
        return rearrange(x, "(b f a c) m (t h w) e -> b (f t) (a h) (c w) (m e)", **sizes)

    def forward(
        self, x: Float[Tensor, "B t h w dim"], cache: Float[Tensor, "Mm 2 slots e"] | None = None
    ) -> Float[Tensor, "B t h w dim"]:
        """x + attention. Keys and values are kept in ``cache``, if one is given."""
        n = math.prod(x.shape[1:4])
        qkv = self.to_qkv(self.norm(x)).unflatten(-1, (self.n_heads, 3, -1))
        cos, sin = self.rotation[:n].to(qkv.dtype).view(*x.shape[1:4], 1, 2, 1, -1).unbind(-3)
        q, k = rotate(qkv[..., :2, :], cos, sin).unbind(-2)
        v = qkv[..., 2, :]
        if cache is not None and self.over_time:  # no later frame looks at the others
            n_samples = len(cache) // (len(x) * self.n_heads)
            pair = repeat([k, v], "two b t h w m e -> (b s m) two (t h w) e", s=n_samples)
            cache.index_copy_(2, self.slots[:n], pair.to(cache.dtype))
        out = attention(*(self._to_windows(part) for part in (q, k, v)), is_causal=True)
        return x + self.to_out(self._from_windows(out, x.shape[:4]))

    def new_cache(self, n_rows: int, dtype: torch.dtype, device: torch.device | str) -> Float[Tensor, "Mm 2 slots e"]:
        """Keys and values of M rows of m heads, nothing in them yet."""
        shape = (n_rows * self.n_heads, 2, self.n_slots, self.rotation.shape[-1])
        return torch.zeros(shape, dtype=dtype, device=device)

    def span(self, index: int) -> tuple[int, int]:
        """The slots, from start to stop, that the position with this raster index sees."""
        slot = int(self.slots[index])
        return slot // self.window_length * self.window_length, slot + 1

    def step(
        self,
        x: Float[Tensor, "M dim"],
        cache: Float[Tensor, "Mm 2 slots e"],
        position: Int[Tensor, "1"],
        span: tuple[int, int] | None = None,
    ) -> Float[Tensor, "M dim"]:
        """One position alone, attending to earlier ones in the cache.

        Args:
            position: its raster index.
            span: ``span(index)``, which saves time; None: no value travels to the host, as CUDA graphs require.
        """
        slot = self.slots.index_select(0, position)
        qkv = self.to_qkv(self.norm(x)).view(len(cache), 3, -1)
        cos, sin = self.step_rotation.index_select(0, position)[0].to(qkv.dtype).unbind(0)
        qkv = rotate(qkv, cos, sin).to(cache.dtype)
        cache.index_copy_(2, slot, qkv[:, 1:, None])
        slots = None
        if span is not None:
            seen = cache[:, :, span[0] : span[1]]
        elif self.window_length == self.n_slots:
            seen, slots = cache, torch.arange(self.window_length, device=x.device)
        else:
            slots = slot // self.window_length * self.window_length
            slots = slots + torch.arange(self.window_length, device=x.device)
            seen = cache.index_select(2, slots)
        keys, values = seen.unbind(1)
        query = qkv[:, :1] * qkv.shape[-1] ** -0.5
        logits = query @ keys.transpose(1, 2)  # for a single query faster than the fused kernel
        if slots is not None:
            logits = logits.masked_fill(slots > slot, -torch.inf)
        return x + self.to_out((logits.softmax(-1) @ values).view(len(x), -1))
