"""Building blocks of residual video diffusion's three networks (Yang et al. 2022, appendix A, Figures 5 and 6)."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from .conv_gru import ConvGRUCell

NORM_GROUPS = 8
SLOPE = 0.2  # of LeakyReLU


class ResBlock(nn.Module):
    """Twice convolution, group normalisation and LeakyReLU, plus a shortcut.

    Args:
        in_channels, out_channels: widths; out_channels is a multiple of 8.
        time_dim: size of the embedding of the diffusion step that is added between the two halves; None: without.
        context_channels: width of a context that is concatenated to the input; None: without. A convolution of two
            concatenated maps is the sum of two convolutions, so that of the context is a layer of its own, whose
            result can be kept while the input changes (``condition``).
    """

    def __init__(
        self, in_channels: int, out_channels: int, time_dim: int | None = None, context_channels: int | None = None
    ) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.norm1 = nn.GroupNorm(NORM_GROUPS, out_channels)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        self.norm2 = nn.GroupNorm(NORM_GROUPS, out_channels)
        projected = in_channels != out_channels or context_channels is not None
        self.shortcut = nn.Conv2d(in_channels, out_channels, 1) if projected else nn.Identity()
        if time_dim is not None:
            self.time = nn.Sequential(nn.SiLU(), nn.Linear(time_dim, out_channels))
        if context_channels is not None:
            self.context_conv = nn.Conv2d(context_channels, out_channels, 3, padding=1, bias=False)
            self.context_shortcut = nn.Conv2d(context_channels, out_channels, 1, bias=False)

    def condition(
        self, context: Float[Tensor, "N context H W"]
    ) -> tuple[Float[Tensor, "N out H W"], Float[Tensor, "N out H W"]]:
        """What the context adds to the first convolution and to the shortcut."""
        return self.context_conv(context), self.context_shortcut(context)

    def forward(
        self,
        x: Float[Tensor, "N C H W"],
        time: Float[Tensor, "N time"] | None = None,
        condition: tuple[Float[Tensor, "N out H W"], Float[Tensor, "N out H W"]] | None = None,
    ) -> Float[Tensor, "N out H W"]:
        """``condition``: of the method of that name."""
        h, shortcut = self.conv1(x), self.shortcut(x)
        if condition is not None:
            h, shortcut = h + condition[0], shortcut + condition[1]
        h = F.leaky_relu(self.norm1(h), SLOPE)
        if time is not None:
            h = h + self.time(time)[..., None, None]
        return F.leaky_relu(self.norm2(self.conv2(h)), SLOPE) + shortcut


def halve(channels: int) -> nn.Conv2d:
    """H x W -> H / 2 x W / 2: a strided convolution."""
    return nn.Conv2d(channels, channels, 3, stride=2, padding=1)


def double(channels: int) -> nn.ConvTranspose2d:
    """H x W -> 2 H x 2 W: a transposed convolution."""
    return nn.ConvTranspose2d(channels, channels, 4, stride=2, padding=1)


class LevelNetwork(nn.Module):
    """A network of levels, any of which may be run with gradient checkpointing, as diffusers switches it on."""

    gradient_checkpointing = False

    def run(self, level: nn.Module, *args: Tensor | tuple | int | None) -> Tensor | tuple:
        """level(*args), its activations recomputed in the backward pass where checkpointing is on."""
        if self.gradient_checkpointing and torch.is_grad_enabled():
            return self._gradient_checkpointing_func(level, *args)
        return level(*args)


class RecurrentLevel(nn.Module):
    """ResBlock, ConvGRU over time, and half the size for the next level (the TD of Figure 6).

    What the network is told, vectors of ``told_dim`` numbers, is added to each channel that the ConvGRU reads: inside
    the ResBlock, its normalisation would take away again what is the same everywhere.
    """

    def __init__(self, in_channels: int, out_channels: int, last: bool, told_dim: int | None = None) -> None:
        super().__init__()
        self.block = ResBlock(in_channels, out_channels)
        self.gru = ConvGRUCell(out_channels, out_channels)
        self.down = None if last else halve(out_channels)
        self.told = None if told_dim is None else nn.Linear(told_dim, out_channels)

    def forward(
        self,
        x: Float[Tensor, "TN C H W"],
        n_frames: int,
        state: Float[Tensor, "N width H W"] | None,
        vectors: Float[Tensor, "TN told"] | None = None,
    ) -> tuple[Float[Tensor, "TN width H W"], Float[Tensor, "TN width _ _"] | None]:
        x = self.block(x)
        if vectors is not None:
            x = x + self.told(vectors)[..., None, None]
        states = self.gru(x, state, n_frames)
        return states, None if self.down is None else self.down(states)


class RecurrentEncoder(LevelNetwork):
    """Frames -> what each level's ConvGRU holds after each of them.

    Args:
        in_channels: C of the frames.
        widths: channels of the levels, from the finest; each has half the side of the one before.
        told_dim: numbers in the vectors that come with the frames; None: none do.
    """

    def __init__(self, in_channels: int, widths: Sequence[int], told_dim: int | None = None) -> None:
        super().__init__()
        inputs, last = [in_channels, *widths[:-1]], len(widths) - 1
        self.levels = nn.ModuleList(
            RecurrentLevel(a, b, i == last, told_dim) for i, (a, b) in enumerate(zip(inputs, widths))
        )

    def forward(
        self,
        frames: Float[Tensor, "TN C H W"],
        n_frames: int = 1,
        states: Sequence[Float[Tensor, "N _ _ _"]] | None = None,
        vectors: Float[Tensor, "TN told"] | None = None,
    ) -> list[Float[Tensor, "TN _ _ _"]]:
        """Read frames of which the first ``len(frames) / n_frames`` are those of the first time, and so on.

        Args:
            frames: T * N of them, time before batch.
            n_frames: T, the number of times.
            states: what the encoder holds, of each level; None: nothing yet.
            vectors: what is told with each frame; None: nothing.
        Returns:
            of each level its states after each frame, time before batch.
        """
        held, x = [], frames
        for level, state in zip(self.levels, states or [None] * len(self.levels)):
            after, x = self.run(level, x, n_frames, state, vectors)
            held.append(after)
        return held
