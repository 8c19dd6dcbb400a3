"""What the decoder of a frame gets of the last observed frame at one level: SVG's skips, or HAF-SVG's aligned features.

Both kinds have ``joined``, how many maps the decoder takes beside its own, and ``memory(encoded)``, what can be
computed of the observed frame alone, once for all the frames that are predicted from it.
"""

from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn

from .attention import attention

VALUES = {"paper": "decoder", "encoder_value": "encoder"}  # form of the aligner -> where its values come from


class Memory(NamedTuple):
    """The observed frame's features, and where they are needed its keys and values."""

    features: Float[Tensor, "N C H W"]
    key: Float[Tensor, "N H*W C"] | None = None
    value: Float[Tensor, "N H*W C"] | None = None

    def map(self, function: Callable[[Tensor], Tensor]) -> "Memory":
        """Apply ``function`` to each of the tensors."""
        return Memory(*(None if tensor is None else function(tensor) for tensor in self))

    @staticmethod
    def cat(parts: Iterable["Memory"]) -> "Memory":
        """Memories of some frames each -> one of all of them."""
        return Memory(*(None if tensors[0] is None else torch.cat(tensors) for tensors in zip(*parts)))


class SkipConnection(nn.Module):
    """SVG's: the decoder's features and the encoder's of the last observed frame, side by side."""

    joined = 1

    def memory(self, encoded: Float[Tensor, "N C H W"]) -> Memory:
        """Of the encoder's features."""
        return Memory(encoded)

    def forward(self, decoded: Float[Tensor, "N C H W"], memory: Memory) -> Float[Tensor, "N joined H W"]:
        """Both of as many frames -> (1 + joined) C maps."""
        return torch.cat([decoded, memory.features, *self.aligned(decoded, memory)], 1)

    def aligned(self, decoded: Float[Tensor, "N C H W"], memory: Memory) -> list[Float[Tensor, "N C H W"]]:
        """What is joined beside the features themselves."""
        return []


class FeatureAligner(SkipConnection):
    """HAF-SVG's feature aligner (section 4.3).

    With N = H * W positions and features F of C channels, of the decoder at time t (d) and of the encoder at the last
    observed frame k (e):

        Q = W_q F_d,  K = W_k F_e,  V = W_v F_d,  S = Q' K,  A = softmax of each row of S (equation 5),
        Z = V A',  output [F_d; F_e; Z]

    The rows of S are not scaled by the width, as in the paper. Memory is linear in N.

    Args:
        channels: C.
        form: "paper" as above. "encoder_value": V = W_v F_e, so that Z gathers what was observed to where it is now
            needed; as written, Z gathers the decoder's own features by where the *observed* ones agree with it.
    Raises:
        ValueError: an unknown form.
    """

    joined = 2

    def __init__(self, channels: int, form: str = "paper") -> None:
        super().__init__()
        if form not in VALUES:
            raise ValueError(f"aligner: expected one of {', '.join(VALUES)}, found {form!r}")
        self.value_source = VALUES[form]
        self.to_query = nn.Linear(channels, channels, bias=False)
        self.to_key = nn.Linear(channels, channels, bias=False)
        self.to_value = nn.Linear(channels, channels, bias=False)

    def memory(self, encoded: Float[Tensor, "N C H W"]) -> Memory:
        positions = to_positions(encoded)
        value = self.to_value(positions) if self.value_source == "encoder" else None
        return Memory(encoded, self.to_key(positions), value)

    def aligned(self, decoded: Float[Tensor, "N C H W"], memory: Memory) -> list[Float[Tensor, "N C H W"]]:
        """[Z]."""
        positions = to_positions(decoded)
        value = self.to_value(positions) if memory.value is None else memory.value
        query, key, value = (x[:, None] for x in (self.to_query(positions), memory.key, value))
        aligned = attention(query, key, value, scale=1.0)[:, 0]
        return [rearrange(aligned, "n (h w) c -> n c h w", w=decoded.shape[3])]


def to_positions(features: Float[Tensor, "N C H W"]) -> Float[Tensor, "N H*W C"]:
    """Maps -> rows of a vector a position, in raster order."""
    return rearrange(features, "n c h w -> n (h w) c")
