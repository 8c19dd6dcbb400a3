"""A transformer over space and time in which a frame sees all of itself and of the past, and nothing of the future.

Two streams of the same frames pass through one set of weights. In the **clean** stream stand frames as they are known;
a frame there sees itself and earlier clean ones. In the **target** stream stand frames as they are on the way to be
predicted (codes masked, numbers noised); a frame there sees itself and the clean frames before it. So one pass trains
the prediction of every frame of a clip, each given the true past, in the place of a pass a frame. When futures are
drawn, the keys and values of the clean stream are cached frame by frame.

Rotary positions on the three axes (Su et al. 2021), RMS norm (Zhang and Sennrich 2019). Each block begins with a
depthwise convolution over the positions of a frame, which shows it what is next to what (conditional positional
encoding, Chu et al. 2021). A vector of each frame (its noise, its conditions) is added to its positions, and shifts,
scales and gates every block by one map that all blocks share (PixArt's adaLN-single, Chen et al. 2023).

Shape letters: B clips, t clean frames, s target frames, P positions of a frame in raster order, d width, m heads.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn

from latentcast.config import check_counts

from .attention import attention
from .positions import rotate, rotation_table


@dataclass
class Past:
    """Keys and values of clean frames, of which ``n_seen`` have been; of each block both."""

    n_seen: int = 0
    blocks: list[list[Float[Tensor, "B m kept e"]]] = field(default_factory=list)

    def repeat_interleave(self, n: int) -> "Past":
        """The same past for ``n`` neighbouring rows each."""
        return Past(self.n_seen, [[x.repeat_interleave(n, 0) for x in pair] for pair in self.blocks])


@dataclass
class Stream:
    """Frames on their way through the blocks.

    first: index of the first frame. vectors: what the frames' vectors, or one of all, add to shift, scale and gate of
    each half of a block. rotation: see ``rotation_table``.
    """

    x: Float[Tensor, "B s P d"]
    first: int
    vectors: Float[Tensor, "B _ 6 d"]
    rotation: Float[Tensor, "2 s*P e"]


class BlockCausalTransformer(nn.Module):
    """The trunk of MaskedTransformer and FlowTransformer.

    Args:
        dim, n_layers, n_heads, head_dim: d, blocks, heads, and the width of each head (even).
        grid: (h, w), positions of a frame.
        window: frames that a frame sees, itself among them. Clips of at most so many are seen whole; in longer ones the
            past is forgotten frame by frame.
        kernel_size: side of the convolutions, odd; 1: none.
        expansion: of the feed-forward network.
    Raises:
        ValueError: a size that is no whole number of at least 1, heads of an odd width, or an even kernel.
    """

    def __init__(
        self,
        dim: int,
        n_layers: int,
        n_heads: int,
        head_dim: int,
        grid: Sequence[int],
        window: int,
        kernel_size: int = 3,
        expansion: int = 4,
    ) -> None:
        super().__init__()
        check_counts(dim=dim, n_layers=n_layers, n_heads=n_heads, head_dim=head_dim, window=window, expansion=expansion)
        check_counts(kernel_size=kernel_size)
        if head_dim % 2:
            raise ValueError(f"head_dim: expected an even number, found {head_dim}")
        if kernel_size % 2 == 0:
            raise ValueError(f"kernel_size: expected an odd number, found {kernel_size}")
        self.grid, self.window, self.head_dim = tuple(grid), window, head_dim
        self.blocks = nn.ModuleList(
            Block(dim, n_heads, head_dim, kernel_size, expansion, n_layers) for _ in range(n_layers)
        )
        self.modulate = nn.Sequential(nn.SiLU(), nn.Linear(dim, 6 * dim))
        nn.init.normal_(self.modulate[1].weight, std=0.02)
        nn.init.zeros_(self.modulate[1].bias)
        self.norm = nn.RMSNorm(dim)

    def forward(
        self,
        clean: Float[Tensor, "B t P d"],
        target: Float[Tensor, "B s P d"],
        clean_vectors: Float[Tensor, " B #t d"],
        target_vectors: Float[Tensor, " B #s d"],
    ) -> Float[Tensor, "B s P d"]:
        """Normalised features of the last s frames of a clip, each seen with the clean frames before it.

        Args:
            clean: all frames but the last, which nothing sees. target: the last s of the t + 1 frames.
            clean_vectors, target_vectors: of their frames.
        """
        return self.norm(self._run(Past(), clean, target, clean_vectors, target_vectors)[0].x)

    def remember(
        self, past: Past, clean: Float[Tensor, "B t P d"], vectors: Float[Tensor, " B #t d"], n_targets: int = 1
    ) -> Past:
        """``past`` with the clean frames that come next, and their vectors; no more is left in it than what the next
        frame sees, and the ``n_targets`` - 1 frames before that."""
        past = self._run(past, clean, None, vectors, None)[1]
        n_kept = (self.window - 2 + n_targets) * clean.shape[2]
        past.blocks = [[x[:, :, max(x.shape[2] - n_kept, 0) :] for x in pair] for pair in past.blocks]
        return past

    def predict(
        self, past: Past, target: Float[Tensor, "B s P d"], vectors: Float[Tensor, " B #s d"]
    ) -> Float[Tensor, "B s P d"]:
        """As ``forward``, of the frame that comes after ``past``, or the last s up to it, and their vectors."""
        return self.norm(self._run(past, None, target, None, vectors)[0].x)

    def _run(self, past, clean, target, clean_vectors, target_vectors):
        """Frames of both streams, or of one, through all blocks -> the Stream of the targets, or None, and the Past."""
        n_positions = (target if clean is None else clean).shape[2]
        n_seen = past.n_seen + (0 if clean is None else clean.shape[1])
        clean, target = self._stream(clean, clean_vectors, n_seen), self._stream(target, target_vectors, n_seen + 1)
        blocks = []
        for index, block in enumerate(self.blocks):
            keys, values = past.blocks[index] if past.blocks else (None, None)
            query = None
            for stream in (clean, target):
                if stream is not None:
                    block.look_around(stream, self.grid)
            if clean is not None:
                query, key, value = block.project(clean)
                keys = key if keys is None else torch.cat([keys, key], 2)
                values = value if values is None else torch.cat([values, value], 2)
            pair = [keys, values]
            blocks.append(pair)
            if query is not None and index + 1 < len(self.blocks):  # of the last block there are looked at keys alone
                attended = [
                    attention(q, *self._seen(pair, frame, frame + 1, n_seen, n_positions))
                    for frame, q in enumerate(query.split(n_positions, 2), clean.first)
                ]
                block.finish(clean, attended)
            if target is not None:
                parts, attended = [x.split(n_positions, 2) for x in block.project(target)], []
                for frame, (q, *own) in enumerate(zip(*parts), target.first):
                    seen = self._seen(pair, frame, frame, n_seen, n_positions)
                    attended.append(attention(q, *(torch.cat(both, 2) for both in zip(seen, own))))
                block.finish(target, attended)
        return target, Past(n_seen, blocks)

    def _seen(self, pair, frame, stop, n_seen, n_positions):
        """Of keys and values of the last clean frames before ``n_seen``, those of the ones before ``stop`` that
        ``frame`` sees."""
        kept_from = n_seen - pair[0].shape[2] // n_positions  # index of the first frame of which there are any
        start = max(frame + 1 - self.window, kept_from)
        return [x[:, :, (start - kept_from) * n_positions : (stop - kept_from) * n_positions] for x in pair]

    def _stream(self, x, vectors, stop):
        """The Stream of frames before ``stop``."""
        if x is None:
            return None
        first = stop - x.shape[1]
        table = rotation_table((x.shape[1], *self.grid), self.head_dim, start=first, device=x.device).to(x.dtype)
        return Stream(
            x + vectors[:, :, None], first, self.modulate(vectors).unflatten(-1, (6, -1)), table.transpose(0, 1)
        )


class Block(nn.Module):
    """A convolution, then attention and a feed-forward network, these after a norm that the frame's vector shifts and
    scales."""

    def __init__(self, dim: int, n_heads: int, head_dim: int, kernel_size: int, expansion: int, n_layers: int) -> None:
        super().__init__()
        self.n_heads = n_heads
        self.around = None
        if kernel_size > 1:
            self.around = nn.Conv2d(dim, dim, kernel_size, padding=kernel_size // 2, groups=dim)
            for parameter in self.around.parameters():  # at first nothing is added
                nn.init.zeros_(parameter)
        self.norms = nn.ModuleList(nn.RMSNorm(dim, elementwise_affine=False) for _ in range(2))
        self.to_qkv = nn.Linear(dim, 3 * n_heads * head_dim, bias=False)
        self.to_out = nn.Linear(n_heads * head_dim, dim, bias=False)
        self.feed_forward = nn.Sequential(
            nn.Linear(dim, expansion * dim), nn.GELU(approximate="tanh"), nn.Linear(expansion * dim, dim)
        )
        for layer in (self.to_out, self.feed_forward[2]):  # the sum over blocks keeps its size (GPT-2)
            nn.init.normal_(layer.weight, std=(2 * n_layers * layer.in_features) ** -0.5)
        # Shift, scale and gate of either half, to which the vector adds; at first every gate is open.
        self.modulation = nn.Parameter(torch.tensor([0.0, 0.0, 1.0, 0.0, 0.0, 1.0])[:, None].repeat(1, dim))

    def look_around(self, stream: Stream, grid: Sequence[int]) -> None:
        """Add to each position of a frame's ``grid`` (h, w) what the convolution sees there."""
        if self.around is not None:
            h, w = grid
            images = rearrange(stream.x, "b s (h w) d -> (b s) d h w", h=h, w=w)
            near = rearrange(self.around(images), "(b s) d h w -> b s (h w) d", b=len(stream.x))
            stream.x = stream.x + near

    def project(
        self, stream: Stream
    ) -> tuple[Float[Tensor, "B m sP e"], Float[Tensor, "B m sP e"], Float[Tensor, "B m sP e"]]:
        """-> queries, keys and values."""
        shift, scale = self._modulation(stream, 0, 1)
        y = self.norms[0](stream.x) * (1 + scale) + shift
        q, k, v = rearrange(self.to_qkv(y), "b s p (three m e) -> three b m (s p) e", three=3, m=self.n_heads)
        return rotate(q, *stream.rotation), rotate(k, *stream.rotation), v

    def finish(self, stream: Stream, attended: list[Float[Tensor, "B m P e"]]) -> None:
        """Move the stream past this block, by what each of its frames attended to."""
        joined = rearrange(torch.stack(attended, 1), "b s m p e -> b s p (m e)")
        gate, shift, scale, feed_gate = self._modulation(stream, 2, 3, 4, 5)
        x = stream.x + gate * self.to_out(joined)
        stream.x = x + feed_gate * self.feed_forward(self.norms[1](x) * (1 + scale) + shift)

    def _modulation(self, stream, *parts):
        """(B, s, 1, d) each."""
        return [(stream.vectors[:, :, i] + self.modulation[i])[:, :, None] for i in parts]
