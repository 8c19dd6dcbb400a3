"""What the DCGAN and the VGG networks of SVG have in common: a vector for a frame, and features at every level."""

from collections.abc import Callable, Iterable, Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.func import functional_call

from ..sizes import nearest_multiples, size_text
from .aligner import Memory, SkipConnection

LevelShape = tuple[int, int, int]  # channels, height and width of a level's features


class MultilevelEncoder(nn.Module):
    """Frames -> the vector h, in [-1, 1], and a list of features, fine to coarse.

    Args:
        levels: a module for each level; the first takes the frames.
        head: the module from the last level's features to (N, dim, 1, 1).
        level_shapes: of each level's features.
    """

    def __init__(self, levels: Iterable[nn.Module], head: nn.Module, level_shapes: list[LevelShape]) -> None:
        super().__init__()
        self.levels, self.head, self.level_shapes = nn.ModuleList(levels), head, level_shapes
        self.apply(init_normal)

    def forward(
        self, frames: Float[Tensor, "N C H W"]
    ) -> tuple[Float[Tensor, "N dim"], list[Float[Tensor, "N _ _ _"]]]:
        x, features = frames, []
        for level in self.levels:
            x = level(x)
            features.append(x)
        return self.head(x).flatten(1), features


class MultilevelDecoder(nn.Module):
    """The vector h and, if it was built for them, an encoder's features -> frames.

    Args:
        levels: a module for each level, fine to coarse; the first gives the frames.
        head: the module from (N, dim, 1, 1) to the coarsest level.
        level_shapes: of what comes to each level from the one below; the encoder's features of that level have the same
            shape.
        joined: for each level, how many maps of that shape it takes beside its own.
    """

    def __init__(
        self, levels: Iterable[nn.Module], head: nn.Module, level_shapes: list[LevelShape], joined: list[int]
    ) -> None:
        super().__init__()
        self.levels, self.head, self.level_shapes, self.joined = nn.ModuleList(levels), head, level_shapes, joined
        self.apply(init_normal)

    def forward(
        self,
        h: Float[Tensor, "N dim"],
        features: Sequence[Float[Tensor, "N _ _ _"] | None] | None = None,
        join: Callable[[int, Tensor, Tensor], Tensor] | None = None,
    ) -> Float[Tensor, "N C H W"]:
        """Decode.

        Args:
            features: of each level, fine to coarse; None for a decoder that takes none. Those of levels with ``joined``
                0 are not looked at.
            join: ``join(level, own, features[level])`` -> (N, (1 + joined) * channels, height, width), where ``own`` is
                what comes from the level below; default: the two side by side.
        Raises:
            ValueError: features for a decoder that takes none, or none for one that does.
        """
        if (features is not None) != any(self.joined):
            expected = "one tensor a level" if any(self.joined) else "None (the decoder was built without)"
            raise ValueError(f"features: expected {expected}, found {'None' if features is None else 'some'}")
        x = self.head(h[:, :, None, None])
        for i in reversed(range(len(self.levels))):
            if self.joined[i]:
                x = join(i, x, features[i]) if join else torch.cat([x, features[i]], 1)
            x = self.levels[i](x)
        return x


class SteadyDecoder:
    """A decoder of many frames with the same features, as those of the last observed frame.

    A level begins with a convolution of its own map and the joined ones. It is linear, so the share of the first joined
    map, the features, is computed once and then added.

    Args:
        decoder: a MultilevelDecoder that takes features at all levels. Its weights as they are now are used, and
            gradients reach them.
        joins: for each level, how the features are joined: a SkipConnection or FeatureAligner.
    """

    def __init__(self, decoder: MultilevelDecoder, joins: Iterable[SkipConnection]) -> None:
        self.head, self.joins, self.levels = decoder.head, joins, []
        for level, (n, *_) in zip(decoder.levels, decoder.level_shapes):
            first, axis = level[0], 0 if isinstance(level[0], nn.ConvTranspose2d) else 1
            own, features, others = first.weight.tensor_split((n, 2 * n), axis)
            self.levels.append((first, torch.cat([own, others], axis), features.clone(), level[1:]))

    def remember(self, features: Iterable[Float[Tensor, "N _ _ _"]]) -> list[Memory]:
        """The features of some frames at each level -> Memories, which hold in place of the features their share in the
        level's first convolution: computed once a frame, for all predicted from it."""
        memories = []
        for (first, _, weight, _), join, encoded in zip(self.levels, self.joins, features):
            memory = join.memory(encoded)
            without_bias = {} if first.bias is None else {"bias": torch.zeros_like(first.bias)}
            share = functional_call(first, {"weight": weight, **without_bias}, (encoded,))
            memories.append(memory._replace(features=share))
        return memories

    def __call__(self, g: Float[Tensor, "N dim"], memories: list[Memory]) -> Float[Tensor, "N C H W"]:
        """What the frame predictor says of N frames, and a Memory of N rows at each level -> the frames."""
        x = self.head(g[:, :, None, None])
        for (first, weight, _, rest), join, memory in reversed(list(zip(self.levels, self.joins, memories))):
            own = torch.cat([x, *join.aligned(x, memory)], 1)
            x = rest(functional_call(first, {"weight": weight}, (own,)) + memory.features)
        return x


def level_widths(height: int, width: int, hidden_channels: int) -> tuple[list[int], tuple[int, int]]:
    """How often a frame is halved, and how wide the levels are: SVG's 4 levels at 64x64 and 5 at 128x128.

    Both sides are halved as long as they are even and at least 8. Channels double from level to level, up to 8 times
    ``hidden_channels``.

    Returns:
        channels of each level, fine to coarse; (height, width) of the map that is left.
    Raises:
        ValueError: frames that cannot be halved once.
    """
    n_levels = n_halvings(height, width)
    if not n_levels:
        nearest = size_text(nearest_multiples(height, width, 2, least=4))
        raise ValueError(
            f"height, width: expected even numbers of at least 8 pixels, found {height}, {width}; the nearest are "
            f"{nearest}"
        )
    return doubled_widths(n_levels, hidden_channels), (height >> n_levels, width >> n_levels)


def n_halvings(height: int, width: int) -> int:
    """How often both sides can be halved while they are even and at least 8."""
    n = 0
    while min(height, width) >= 8 and height % 2 == width % 2 == 0:
        n, height, width = n + 1, height // 2, width // 2
    return n


def doubled_widths(n_levels: int, hidden_channels: int) -> list[int]:
    """Channels of each level: doubled from level to level, up to 8 times ``hidden_channels``."""
    return [hidden_channels * min(2**level, 8) for level in range(n_levels)]


def level_shapes(channels: Sequence[int], height: int, width: int, first: int = 0) -> list[LevelShape]:
    """Of each level, whose sides have been halved ``first``, ``first + 1``, ... times."""
    return [(n, height >> i, width >> i) for i, n in enumerate(channels, start=first)]


def joined_maps(joined: int | Sequence[int], n_levels: int) -> list[int]:
    """A number for all levels, or already one for each -> the latter."""
    joined = [joined] * n_levels if isinstance(joined, int) else list(joined)
    if len(joined) != n_levels or min(joined) < 0:
        raise ValueError(f"joined: expected numbers of at least 0 for {n_levels} levels, found {joined}")
    return joined


def normalized(convolution: nn.Conv2d | nn.ConvTranspose2d, activation: nn.Module | None = None) -> list[nn.Module]:
    """[convolution, BatchNorm, LeakyReLU 0.2 or ``activation``]. The convolution needs no bias: BatchNorm has one."""
    return [convolution, nn.BatchNorm2d(convolution.out_channels), activation or nn.LeakyReLU(0.2)]


def final_activation(name: str) -> nn.Module:
    """Of the frames: "tanh", which is SVG's sigmoid over frames in [-1, 1] instead of [0, 1], or "linear"."""
    if name not in ("tanh", "linear"):
        raise ValueError(f"output_activation: expected 'tanh' or 'linear', found {name!r}")
    return nn.Tanh() if name == "tanh" else nn.Identity()


def init_normal(module: nn.Module) -> None:
    """The initial weights of DCGAN and SVG: N(0, 0.02), for BatchNorm N(1, 0.02); biases 0. For ``Module.apply``."""
    if isinstance(module, (nn.Conv2d, nn.ConvTranspose2d, nn.Linear, nn.BatchNorm2d)):
        nn.init.normal_(module.weight, 1.0 if isinstance(module, nn.BatchNorm2d) else 0.0, 0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
