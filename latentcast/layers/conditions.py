"""What a prior is told beside the frames: actions, labels, states; embedded here, for all priors alike."""

import math
from collections.abc import Iterable, Mapping

import torch
import torch.nn.functional as F
from jaxtyping import Float, Shaped
from torch import Tensor, nn

from latentcast.config import one_line
from latentcast.shapes import Conditions

LEAST_SPREAD = 1e-6  # of a number that conditions hold: one that never changes says nothing


class ConditionEmbedding(nn.Module):
    """Conditions -> one vector for each frame, a sum over all of them.

    Whole numbers have a table of vectors each; other numbers, brought to zero mean and unit variance as ``measure``
    found them, go through two linear layers. In the place of what is not told stands a learned vector, which training
    shows for a share of its clips, so that one model predicts with conditions and without (Ho and Salimans,
    "Classifier-Free Diffusion Guidance", 2022).

    Args:
        conditions: name -> ``{"shape", "dtype", "per"[, "n_values"]}``, as a data set declares them (see VideoDataset).
        dim: size of the vectors.
        dropout: share of training's clips that are told nothing.
    Raises:
        ValueError: a declaration that lacks something, or a share out of [0, 1).
    """

    def __init__(self, conditions: Mapping[str, Mapping], dim: int, dropout: float = 0.1) -> None:
        super().__init__()
        if not 0 <= dropout < 1:
            raise ValueError(f"condition_dropout: expected at least 0 and below 1, found {one_line(dropout)}")
        # In one order, whatever that of the mapping: a saved config sorts it.
        self.declared, self.dropout = {name: dict(spec) for name, spec in sorted(conditions.items())}, dropout
        self.null = nn.Parameter(torch.zeros(dim))
        self.networks = nn.ModuleList()
        for name, spec in self.declared.items():
            if not {"shape", "dtype", "per"} <= spec.keys():
                raise ValueError(f"conditions: {name}: expected shape, dtype and per, found {one_line(spec)}")
            size = math.prod(spec["shape"])
            if spec["dtype"] == "float32":
                network = Numbers(size, dim)
            elif spec.get("n_values"):
                network = WholeNumbers(size, spec["n_values"], dim)
            else:
                raise ValueError(f"conditions: {name}: expected n_values of whole numbers, found {one_line(spec)}")
            self.networks.append(network)

    def forward(self, conditions: Conditions | None, batch: int, n_frames: int) -> Float[Tensor, "batch n_frames dim"]:
        """A vector for each frame.

        Args:
            conditions: a batch of 1 stands for all. None: nothing is told.
        Raises:
            ValueError: see ``check_conditions``.
        """
        nothing = self.null.expand(batch, n_frames, -1)
        if conditions is None:
            return nothing
        found = check_conditions(conditions, self.declared, batch, n_frames)
        total = 0
        for (name, spec), network in zip(self.declared.items(), self.networks):
            value = found[name].to(self.null.device, non_blocking=True)
            vectors = network(value.flatten(-len(spec["shape"])) if spec["shape"] else value[..., None])
            total = total + (vectors if spec["per"] == "frame" else vectors[:, None])
        total = total.expand(batch, n_frames, -1)
        if self.training and self.dropout:
            left_out = torch.rand(batch, 1, 1, device=total.device) < self.dropout
            total = torch.where(left_out, nothing, total)
        return total

    @torch.no_grad()
    def measure(self, clips: Iterable[Mapping[str, Tensor]]) -> None:
        """Told before training what the numbers are like, by some clips' conditions."""
        clips = list(clips)
        for (name, spec), network in zip(self.declared.items(), self.networks):
            if isinstance(network, Numbers) and clips:
                network.measure(torch.cat([clip[name].reshape(-1, math.prod(spec["shape"])) for clip in clips]))


class WholeNumbers(nn.Module):
    """Whole numbers from 0 to n_values - 1 -> the sum of a vector for each."""

    def __init__(self, size: int, n_values: int, dim: int) -> None:
        super().__init__()
        self.table = nn.Embedding(size * n_values, dim)
        nn.init.normal_(self.table.weight, std=size**-0.5)
        self.register_buffer("first_row", torch.arange(size) * n_values, persistent=False)

    def forward(self, x: Shaped[Tensor, "*rows size"]) -> Float[Tensor, "*rows dim"]:
        return self.table(x.long() + self.first_row).sum(-2)


class Numbers(nn.Module):
    """Numbers -> a vector, by two linear layers."""

    def __init__(self, size: int, dim: int) -> None:
        super().__init__()
        self.hidden, self.out = nn.Linear(size, dim), nn.Linear(dim, dim)
        self.register_buffer("mean", torch.zeros(size))
        self.register_buffer("spread", torch.ones(size))

    def forward(self, x: Shaped[Tensor, "*rows size"]) -> Float[Tensor, "*rows dim"]:
        x = (x.to(self.mean.dtype) - self.mean) / self.spread
        return self.out(F.silu(self.hidden(x)))

    def measure(self, values: Shaped[Tensor, "N size"]) -> None:
        """Take mean and standard deviation of each number."""
        spread = values.float().std(0, correction=0)
        self.mean.copy_(values.float().mean(0))
        self.spread.copy_(torch.where(spread > LEAST_SPREAD, spread, torch.ones_like(spread)))


def check_conditions(
    conditions: Conditions, declared: Mapping[str, Mapping], batch: int, n_frames: int
) -> dict[str, Tensor]:
    """Refuse conditions that are not what was declared -> the same as tensors.

    Values on a GPU are taken as they are: looking at them would wait for it, and training's are the data set's own. So
    are those of a compiled graph, which looking would break.

    Args:
        conditions, batch, n_frames: see ConditionEmbedding. declared: its ``conditions``.
    Raises:
        ValueError: an unknown name or one that lacks, another shape, or values out of their range.
    """
    if not hasattr(conditions, "keys"):
        raise ValueError(f"conditions: expected a mapping from names to tensors, found {one_line(conditions)}")
    unknown, lacking = [[n for n in a if n not in b] for a, b in ((conditions, declared), (declared, conditions))]
    if unknown or lacking:
        found = f"{one_line(unknown[0])}, which it does not know" if unknown else f"no {lacking[0]}"
        raise ValueError(f"conditions: expected {', '.join(declared) or 'none'}, found {found}")
    found = {}
    for name, spec in declared.items():
        try:
            value = torch.as_tensor(conditions[name])
        except (TypeError, ValueError, RuntimeError, OverflowError):
            raise ValueError(f"conditions: {name}: expected numbers, found {one_line(conditions[name])}") from None
        frames = [n_frames] if spec["per"] == "frame" else []
        shapes = [tuple([n, *frames, *spec["shape"]]) for n in dict.fromkeys((batch, 1))]
        if tuple(value.shape) not in shapes:
            kind = f"{n_frames} frames" if frames else "a video"
            raise ValueError(f"conditions: {name}: expected {shapes[0]} ({kind}), found {tuple(value.shape)}")
        whole = spec["dtype"] != "float32"
        if whole and (value.is_floating_point() or value.is_complex()):
            raise ValueError(f"conditions: {name}: expected whole numbers, found {value.dtype}")
        if value.device.type == "cpu" and value.numel() and not torch.compiler.is_compiling():
            if whole and not 0 <= value.min() <= value.max() < spec["n_values"]:
                wrong = value[(value < 0) | (value >= spec["n_values"])][0].item()
                raise ValueError(f"conditions: {name}: expected 0 to {spec['n_values'] - 1}, found {wrong}")
            if not whole and not value.isfinite().all():
                raise ValueError(f"conditions: {name}: expected finite numbers, found {value[~value.isfinite()][0]}")
        found[name] = value
    return found
