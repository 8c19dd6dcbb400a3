"""The interface of stage two: a prior predicts the future of a clip in the space of its latents."""

import inspect
import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from diffusers.utils import BaseOutput
from jaxtyping import Float, Int, Shaped
from torch import Tensor

from latentcast.config import MisfitError, is_whole
from latentcast.layers.conditions import ConditionEmbedding
from latentcast.modeling import VideoModel, eval_mode
from latentcast.shapes import Clip, Conditions, Frames, Latents, Scalar
from latentcast.sizes import nearest_fit
from latentcast.tokenizers.base import LatentSpec, check_frames, check_latents

logger = logging.getLogger("latentcast")


@dataclass
class PriorOutput(BaseOutput):
    """What ``forward`` returns.

    loss: to minimise.
    logs: by name, detached, for the logger.
    logits: of the codes of each codebook after the context, of code priors that predict all positions at once; joint
        training needs them.
    """

    loss: Scalar
    logs: dict[str, Scalar] = field(default_factory=dict)
    logits: list[Float[Tensor, "B future h w _"]] | None = None


@dataclass(frozen=True)
class SamplerOption:
    """A keyword argument of ``sample``, for those who offer it as a field.

    default: None often stands for what follows from the model.
    kind: int, float, bool or str; None: no single value, but a list or a dict.
    least, most: ends of its range, both within; None: open.
    above: in the place of ``least``, a lower end that is not within.
    choices: the names that may be given.
    """

    default: object
    kind: type | None
    least: float | None = None
    most: float | None = None
    above: float | None = None
    choices: tuple = ()


Told = Callable[[int], Float[Tensor, "B dim"]]  # what ``condition_vectors`` gives of a frame, by its number
Progress = Callable[..., AbstractContextManager]  # like tqdm: is given ``total=``, and returns a bar to ``update``


class Prior(VideoModel):
    """Base class of stage two.

    The first init argument of every prior is ``latent_spec``, what ``FrameTokenizer.latent_spec`` gives; it is saved
    with the model. ``accepts`` names the space of the clips that the prior is trained on: "codes" (int64), "latents" or
    "pixels" (frames in [-1, 1]).

    Two more init arguments are common to all: ``conditions``, what the prior is told beside the frames, as the data
    declare it (see VideoDataset), and ``condition_dropout``, the share of training's clips that are told nothing.
    Methods take ``conditions``: (B, T, *shape) of those per frame, for context and future, and (B, *shape) of those per
    video, with a batch of 1 for all; None: nothing is told. What stands at frame t is what led to it.

    A subclass calls ``make_conditioner`` in its ``__init__``, and says in ``stream`` how futures are drawn frame by
    frame.

    Contract, tested for every subclass: any ``n_frames``, any ``n_context`` from ``min_context`` up, seeded sampling is
    reproducible, and no future frame leaks into the past (by gradient).
    """

    accepts = "codes"
    min_context = 1
    deterministic = False  # True: ``sample`` draws nothing; all samples of a context are one and the same
    eval_seed = 0  # of the noise of ``forward`` in eval mode; validation gives each batch its own
    explains = ()  # the names of what ``explain`` gives
    clip_frames = None  # how many frames each clip must have that ``forward`` and ``explain`` take; None: any number

    @property
    def conditions(self) -> dict[str, dict]:
        """What the prior is told of each frame or video, as in VideoDataset."""
        return self.config.get("conditions") or {}

    def make_conditioner(self, dim: int) -> None:
        """Add the ``conditioner``, which embeds conditions as vectors of ``dim`` numbers, where there are any."""
        if self.conditions:
            self.condition_embedding = ConditionEmbedding(self.conditions, dim, self.config.condition_dropout)

    @property
    def conditioner(self) -> ConditionEmbedding | None:
        """Of a prior with conditions."""
        found = self._modules.get("condition_embedding")
        return found if isinstance(found, ConditionEmbedding) else None

    def condition_vectors(
        self, conditions: Conditions | None, batch: int, n_frames: int
    ) -> Float[Tensor, "B T dim"] | None:
        """What conditions say of each frame of ``batch`` clips of ``n_frames``; of a prior without any None."""
        if self.conditioner is not None:
            return self.conditioner(conditions, batch, n_frames)
        if conditions:
            raise ValueError(
                f"conditions: {type(self).__name__} was trained without any, found {', '.join(conditions)}"
            )
        return None

    def sampling_vectors(
        self, conditions: Conditions | None, batch: int, n_frames: int
    ) -> Float[Tensor, "B T dim"] | None:
        """The same for what is predicted, whatever mode the prior is in: of no clip are conditions left out."""
        with eval_mode(self.conditioner):
            return self.condition_vectors(conditions, batch, n_frames)

    def _told(self, conditions, batch, n_frames):
        """``told`` of ``stream``, of conditions that are known of all frames."""
        vectors = self.sampling_vectors(conditions, batch, n_frames)
        return lambda t: vectors[:, t]

    def told_frames(self, n_context: int, n_frames: int, **options: object) -> int:
        """How many frames the conditions per frame are of, that ``sample`` takes with these options."""
        return n_context + n_frames

    def prepare(self, clips: Iterable[Clip]) -> None:
        """Told before training what there is to learn, by some clips of the train split, one at a time."""

    def forward(self, clip: Clip, n_context: int, conditions: Conditions | None = None) -> PriorOutput:
        """Training loss of predicting ``clip[:, n_context:]`` by teacher forcing."""
        raise NotImplementedError

    def sample(
        self,
        context: Clip,
        n_frames: int,
        *,
        num_samples: int = 1,
        generator: torch.Generator | None = None,
        progress: Progress | None = None,
        conditions: Conditions | None = None,
    ) -> Shaped[Tensor, "B {num_samples} {n_frames} _ _ _"]:
        """Continue ``context`` by ``n_frames`` frames, in ``num_samples`` ways.

        Subclasses add sampler options as keyword arguments.
        """
        raise NotImplementedError

    def stream(
        self, context: Clip, told: Told, *, num_samples: int, generator: torch.Generator | None, **options: object
    ) -> Iterator[Shaped[Tensor, "B {num_samples} _ _ _"]]:
        """A Python generator of the frames that ``sample`` gives at once, without an end.

        It keeps what the next frame needs and no more, so that each costs the same time and memory.

        Args:
            context, num_samples, generator: as for ``sample``.
            told: of frame t, counted from the context's first. Those of the context are there until the first frame is
                drawn, and that of a frame that is to be predicted while it is. Not called by priors without conditions.
            **options: all sampler options; ``rollout`` adds the defaults that stand in ``sample``.
        """
        raise NotImplementedError

    def rollout(
        self,
        context: Clip,
        *,
        num_samples: int = 1,
        generator: torch.Generator | None = None,
        conditions: Conditions | None = None,
        **options: object,
    ) -> "Rollout":
        """Begin futures of ``context`` that are predicted one frame at a time.

        Args:
            num_samples, generator: as for ``sample``; with the same, the frames are the same.
            conditions: of the context's frames, and those per video.
            **options: sampler options.
        """
        return Rollout(self, context, num_samples, generator, conditions, options)

    def log_prob(self, clip: Clip, n_context: int, conditions: Conditions | None = None) -> Float[Tensor, " B"]:
        """Log-likelihood in nats of ``clip[:, n_context:]`` given the context. Likelihood priors only."""
        raise NotImplementedError(f"{type(self).__name__} has no tractable likelihood")

    def explain(
        self,
        clip: Clip,
        n_context: int,
        *,
        num_samples: int = 1,
        generator: torch.Generator | None = None,
        conditions: Conditions | None = None,
        **options: object,
    ) -> dict[str, Shaped[Tensor, "B ..."]]:
        """What lies behind the predictions of ``clip[:, n_context:]``, for figures: name -> tensor, the batch first.

        The names, those in ``explains``, say what: ``nats`` (B, T - n_context, h, w, n_codebooks), what each code
        costs; ``kl`` (B, T - 1, G, group_dim), nats of each number of the G groups of z; ``mu`` and ``future``
        (B, T - n_context, ...), the mean and what was drawn around it; ``motion`` (B, S, 1 + T - n_context, ...),
        motion features from the last given frame on; ``decoding`` (B, n_steps, h, w, n_codebooks) and ``depth``
        (B, n_steps, h, w), codes after each step in which the first frame is drawn, and how many of each position are
        known.

        Args:
            clip, conditions: as for ``forward``. num_samples, generator: as for ``sample``, of priors that draw here.
            **options: sampler options.
        """
        return {}

    def _sampling_defaults(self):
        """Sampler options and their defaults, as they stand in ``sample``."""
        common = {"context", "n_frames", "num_samples", "generator", "progress", "conditions"}
        found = inspect.signature(self.sample).parameters
        return {name: parameter.default for name, parameter in found.items() if name not in common}

    def sampler_options(self) -> dict[str, SamplerOption]:
        """What ``sample`` takes beyond the common arguments, and ``pipe(..., **sampler)`` may pass, sorted by name. The
        kind follows from the default where ``sampler_ranges`` says nothing of it. A prior without conditions has
        nothing to be guided by."""
        defaults, ranges, options = self._sampling_defaults(), self.sampler_ranges(), {}
        if self.conditioner is None:
            defaults.pop("guidance_scale", None)
        for name, default in sorted(defaults.items()):
            kind = type(default) if isinstance(default, bool | int | float | str) else None
            options[name] = SamplerOption(**{"default": default, "kind": kind} | ranges.get(name, {}))
        return options

    def sampler_ranges(self) -> dict[str, dict]:
        """name -> fields of the SamplerOption that the default in ``sample`` does not tell; a subclass says its own."""
        return {}

    def options_of(self, options: dict[str, object], index: int, n_contexts: int, n_frames: int) -> dict[str, object]:
        """Sampler options of a batch of contexts -> those of context ``index`` when it is sampled alone.

        Args:
            options: name -> value. Values that hold one for each context are cut here: ``frame_times`` (B, n_frames);
                subclasses do so with their own.
        """
        times = options.get("frame_times")
        if times is not None and times.ndim == 2:
            options = options | {"frame_times": times[index : index + 1]}
        return options

    def check_context(self, n_context: int, n_total: int) -> None:
        """Refuse a context that is too short for the prior or leaves nothing to predict."""
        if n_context < self.min_context:
            raise ValueError(f"n_context: expected at least {self.min_context}, found {n_context}")
        if n_context >= n_total:
            raise ValueError(f"n_context: expected fewer than the clip's {n_total} frames, found {n_context}")


class ContinuousPrior(Prior):
    """A prior over numbers: frames where ``latent_spec`` is of kind "pixels", else the latents of any tokenizer."""

    @property
    def accepts(self) -> str:
        """The space of ``latent_spec``: "pixels" or "latents"."""
        return "pixels" if self.config.latent_spec["kind"] == "pixels" else "latents"

    def check_clip(self, clip: Frames | Latents, name: str = "clip") -> None:
        """Refuse anything but floats of the sizes in ``latent_spec``, pixels within [-1, 1]."""
        spec = self.config.latent_spec
        check = check_frames if self.accepts == "pixels" else check_latents
        check(clip, spec["channels"], spec["height"], spec["width"], name=name)

    def in_range(self, x: Float[Tensor, "*x"]) -> Float[Tensor, "*x"]:
        """x, of pixels within [-1, 1]."""
        return x.clamp(-1, 1) if self.accepts == "pixels" else x


class Rollout:
    """Futures of some contexts, predicted frame by frame, see ``Prior.rollout``."""

    def __init__(
        self,
        prior: Prior,
        context: Clip,
        num_samples: int,
        generator: torch.Generator | None,
        conditions: Conditions | None,
        options: dict[str, object],
    ) -> None:
        self.prior, self._batch, self._next = prior, *context.shape[:2]
        prior.check_context(self._next, self._next + 1)
        per = {name: spec["per"] for name, spec in prior.conditions.items()}
        self._of_video = {name: value for name, value in (conditions or {}).items() if per.get(name) == "video"}
        self._all_of_video = "frame" not in per.values()
        with torch.no_grad():
            vectors = prior.sampling_vectors(conditions, self._batch, self._next)
        self._vectors = {} if vectors is None else dict(enumerate(vectors.unbind(1)))  # that are not asked for yet
        settings = {"num_samples": num_samples, "generator": generator, **prior._sampling_defaults(), **options}
        self._frames = prior.stream(context, lambda t: self._vectors[t], **settings)

    @torch.no_grad()
    def step(self, conditions: Conditions | None = None) -> Shaped[Tensor, "B S _ _ _"]:
        """The next frame of each future.

        Args:
            conditions: what leads to it, (B, *shape) of all conditions per frame. None: nothing is told.
        """
        if conditions is not None or self._all_of_video:
            one = {n: x[:, None] if torch.is_tensor(x) and x.ndim else x for n, x in (conditions or {}).items()}
            conditions = {**self._of_video, **one} or None  # what is no tensor of a batch is refused with the rest
        with eval_mode(self.prior):
            vectors = self.prior.condition_vectors(conditions, self._batch, 1)
            if vectors is not None:
                self._vectors[self._next] = vectors[:, 0]
            frame = next(self._frames)
        self._vectors.clear()
        self._next += 1
        return frame


def as_keyword(conditions: Conditions | None) -> dict[str, Conditions]:
    """Conditions as an argument of a prior's method; {} for None: a prior that is told nothing need not take it."""
    return {} if conditions is None else {"conditions": conditions}


def check_widths(**lists: Sequence[int]) -> None:
    """Refuse lists (of a network's levels) that are empty or hold anything but whole numbers of at least 1, by name."""
    for name, values in lists.items():
        if not values or not all(is_whole(value, 1) for value in values):
            raise ValueError(f"{name}: expected whole numbers of at least 1, found {list(values)}")


def code_nats(logits: Float[Tensor, "*codes K"], codes: Int[Tensor, "*codes"]) -> Float[Tensor, "*codes"]:
    """What each code costs, its cross-entropy in nats, fp32."""
    return F.cross_entropy(logits.flatten(0, -2).float(), codes.flatten(), reduction="none").view(codes.shape)


def need_codes(latent_spec: LatentSpec, who: str) -> None:
    """Refuse latents without codes."""
    if not latent_spec["codebook_sizes"]:
        found = "latents without any"
        if latent_spec["kind"] == "pixels":
            found = "continuous pixels (tokenizer.levels=256 makes codes of them)"
        raise MisfitError(f"latent_spec: {who} needs codes, found {found}", "codes")


def levels_for(
    latent_spec: LatentSpec, fit: bool, name: str, values: Sequence[int], *beside: Sequence[int], single: bool = True
) -> list[list[int]]:
    """Lists that say something of each level of a network, where each has half the sides of the one before -> the same,
    a list each, of levels that the latents allow.

    Args:
        fit: whether the last levels are left out, and a line says so, where there are too many; else they are refused.
        name, values: an argument of the prior. beside: other lists as long as this one.
        single: whether the last level may be a single position.
    Raises:
        MisfitError: too many levels.
    """
    height, width = latent_spec["height"], latent_spec["width"]
    most = 1
    while not (height % 2**most or width % 2**most) and (single or height * width > 4**most):
        most += 1
    if len(values) > most:
        kept, stride = list(values[:most]), 2 ** (len(values) - 1)
        one = "" if single else ", and more than one position at the last level"
        if not fit:
            raise MisfitError(
                f"{name}: {len(values)} of them need multiples of {stride} in height and width{one}, found {height} x "
                f"{width}; take at most {most}, {kept}, or {nearest_fit(latent_spec, stride, positions=2 - single)}"
            )
        logger.info("prior.%s=%s: cut to %s, for latents of %d x %d", name, list(values), kept, height, width)
    return [list(each[:most]) for each in (values, *beside)]


class no_progress:
    """Stands in for a progress bar when nobody watches."""

    def __init__(self, total: int | None = None) -> None:
        self.total = total

    def __enter__(self) -> "no_progress":
        return self

    def __exit__(self, *exception: object) -> bool:
        return False

    def update(self, n: int = 1) -> None:
        """Do nothing."""
