"""Attention over the positions of a feature map at linear cost."""

from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn


class LinearAttention(nn.Module):
    """x + attention(x) in the "efficient" form of Shen et al. 2021.

    Keys are normalised over the positions, queries over a head's dimensions, so the values are first summed into one
    (head_dim, head_dim) matrix a head: the cost grows with H W, not with its square.

    Args:
        channels: C.
        n_heads, head_dim: number of heads, and the dimensions of each.
    """

    def __init__(self, channels: int, n_heads: int = 4, head_dim: int = 16) -> None:
        super().__init__()
        self.n_heads = n_heads
        self.norm = nn.GroupNorm(1, channels)
        self.to_qkv = nn.Conv2d(channels, 3 * n_heads * head_dim, 1, bias=False)
        self.to_out = nn.Conv2d(n_heads * head_dim, channels, 1)

    def forward(self, x: Float[Tensor, "N C H W"]) -> Float[Tensor, "N C H W"]:
        qkv = self.to_qkv(self.norm(x))
        query, key, value = rearrange(qkv, "n (three m e) h w -> three n m e (h w)", three=3, m=self.n_heads)
        summary = value @ key.softmax(-1).transpose(2, 3).to(value.dtype)
        out = summary @ query.softmax(-2).to(value.dtype)
        return x + self.to_out(rearrange(out, "n m e (h w) -> n (m e) h w", w=x.shape[3]))
