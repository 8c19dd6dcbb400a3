"""What the priors on the trunk of ``latentcast/layers/block_causal.py`` have in common."""

from collections.abc import Sequence

import torch
from jaxtyping import Float, Shaped
from torch import Tensor, nn

from latentcast.config import check_counts
from latentcast.layers.block_causal import BlockCausalTransformer, Past
from latentcast.shapes import Clip

from .base import Prior


class BlockCausalPrior(Prior):
    """A prior in which a frame is predicted from the earlier ones, all frames of a clip in one pass.

    A vector of each frame enters every block: as which it stands there (clean, or as a target on its way), how damaged
    the past is (as the subclass counts that, from 0 to 1), and what is told of it. Clips are of at most
    ``config.n_frames``; in longer rollouts the model sees the last of them.
    """

    def make_trunk(
        self,
        grid: Sequence[int],
        dim: int,
        n_layers: int,
        n_heads: int,
        head_dim: int,
        n_frames: int,
        window: int | None,
        kernel_size: int,
    ) -> None:
        """Add the trunk over frames of ``grid`` (h, w) positions, and what all priors on it have beside it."""
        window = n_frames if window is None else window
        check_counts(least=2, n_frames=n_frames, window=window)
        self.trunk = BlockCausalTransformer(dim, n_layers, n_heads, head_dim, grid, window, kernel_size)
        self.places = nn.Parameter(torch.randn(grid[0] * grid[1], dim))
        self.as_clean, self.as_target = (nn.Parameter(torch.zeros(dim)) for _ in range(2))
        self.corrupt = nn.Sequential(nn.Linear(1, dim), nn.SiLU(), nn.Linear(dim, dim))
        self.make_conditioner(dim)

    def vectors(
        self, stands_as: Float[Tensor, " d"], damage: Shaped[Tensor, "B _"], told: Float[Tensor, "B s d"] | None = None
    ) -> Float[Tensor, "B _ d"]:
        """What tells the blocks of frames: damage of each, or one of all frames, and what is told of them."""
        x = stands_as + self.corrupt(damage[..., None].to(self.dtype))
        return x if told is None else x + told

    def _both_vectors(self, damage, told, n_context):
        """Of the frames of both streams, where the past is damaged by (B, 1), and (B, t, d) or nothing is told of the
        clip -> (B, t - 1 or 1, d), (B, t - n_context or 1, d)."""
        parts = (None, None) if told is None else (told[:, :-1], told[:, n_context:])
        return [self.vectors(*each) for each in zip((self.as_clean, self.as_target), (damage,) * 2, parts)]

    def copied_vectors(
        self,
        stands_as: Float[Tensor, " d"],
        copies: Sequence[tuple[float, bool]],
        told: Float[Tensor, "{n_contexts} d"] | None,
        n_contexts: int,
        num_samples: int,
    ) -> Float[Tensor, "rows 1 d"]:
        """Vectors of a frame for a sampler's rows, of which there are several copies: copies * n_contexts *
        num_samples.

        Args:
            copies: of each (damage of the past, whether the conditions are told).
            told: None of a prior without conditions.
        """
        vectors = []
        for damage, is_told in copies:
            rows = told if told is None or is_told else self.conditioner.null.expand_as(told)
            damage = torch.full((n_contexts, 1), float(damage), device=self.device)
            vectors.append(self.vectors(stands_as, damage, None if rows is None else rows[:, None]))
        return torch.cat(vectors).repeat_interleave(num_samples, 0)

    def check_length(self, clip: Clip, n_context: int) -> None:
        """Refuse clips of more frames than the model sees, and contexts that do not fit."""
        if clip.shape[1] > self.config.n_frames:
            raise ValueError(f"clip: expected at most {self.config.n_frames} frames (n_frames), found {clip.shape[1]}")
        self.check_context(n_context, clip.shape[1])

    def _rand(self, shape, generator=None, draw=torch.rand):
        """Uniform numbers in [0, 1), or those of ``torch.randn``, on the model's device, drawn on the generator's."""
        device = self.device if generator is None else generator.device
        return draw(shape, generator=generator, device=device).to(self.device, non_blocking=True)


class Memory:
    """The clean frames that a sampler's rows have seen; ``past`` is what ``BlockCausalTransformer.predict`` takes.

    Args:
        trunk: the transformer.
        cached: False: all frames are kept, and read anew with each that is added.
    """

    def __init__(self, trunk: BlockCausalTransformer, cached: bool) -> None:
        self.trunk, self.past, self.frames = trunk, Past(), None if cached else []

    def add(self, clean: Float[Tensor, "M t P d"], vectors: Float[Tensor, " M #t d"]) -> None:
        """Remember the frames that come next, and their vectors."""
        past = self.past
        if self.frames is not None:
            self.frames.append((clean, vectors))
            past, clean, vectors = Past(), *(torch.cat(parts, 1) for parts in zip(*self.frames))
        self.past = self.trunk.remember(past, clean, vectors)

    def repeat_interleave(self, n: int) -> None:
        """From now on there are ``n`` neighbouring rows for each."""
        self.past = self.past.repeat_interleave(n)
        if self.frames is not None:
            self.frames = [tuple(x.repeat_interleave(n, 0) for x in pair) for pair in self.frames]
