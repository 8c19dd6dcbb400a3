"""The interface of stage two: a prior predicts the future of a clip in the space of its latents."""

import inspect
import logging
from dataclasses import dataclass, field

import torch
from diffusers.utils import BaseOutput

from latentcast.config import MisfitError, is_whole
from latentcast.modeling import VideoModel

logger = logging.getLogger("latentcast")


@dataclass
class PriorOutput(BaseOutput):
    """What ``forward`` returns.

    loss: scalar to minimise.
    logs: name -> detached scalar tensor, for the logger.
    logits: one tensor (B, T - n_context, h, w, codebook_size) a codebook, of code priors that predict all positions at
        once; joint training needs it.
    """

    loss: torch.Tensor
    logs: dict = field(default_factory=dict)
    logits: list | None = None


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


class Prior(VideoModel):
    """Base class of stage two.

    The first init argument of every prior is ``latent_spec``, the dict that ``FrameTokenizer.latent_spec`` returns; it
    is saved with the model. ``accepts`` names the space of the clips that the prior is trained on: "codes"
    (B, T, h, w, n_codebooks), "latents" (B, T, D, h, w) or "pixels" (B, T, C, H, W) in [-1, 1].

    Contract, tested for every subclass: any ``n_frames``, any ``n_context`` from ``min_context`` up, seeded sampling is
    reproducible, and no future frame leaks into the past (by gradient).
    """

    accepts = "codes"
    min_context = 1
    deterministic = False  # True: ``sample`` draws nothing; all samples of a context are one and the same
    eval_seed = 0  # of the noise of ``forward`` in eval mode; validation gives each batch its own
    explains = ()  # the names of what ``explain`` gives
    conditions: dict = {}  # noqa: RUF012  (what the prior needs of each frame or video, as in VideoDataset)

    def prepare(self, clips):
        """Told before training what there is to learn: an iterable over some clips (1, T, ...) of the train split."""

    def forward(self, clip, n_context):
        """Training loss of predicting ``clip[:, n_context:]`` by teacher forcing -> PriorOutput."""
        raise NotImplementedError

    def sample(self, context, n_frames, *, num_samples=1, generator=None, progress=None):
        """Continue ``context`` (B, n_context, ...) by ``n_frames`` frames -> (B, num_samples, n_frames, ...).

        Subclasses add sampler options as keyword arguments, and take ``progress``: a callable like ``tqdm`` that
        is given ``total=`` and returns a bar to ``update``.
        """
        raise NotImplementedError

    def log_prob(self, clip, n_context):
        """Log-likelihood in nats of ``clip[:, n_context:]`` given the context -> (B,). Likelihood priors only."""
        raise NotImplementedError(f"{type(self).__name__} has no tractable likelihood")

    def explain(self, clip, n_context, *, num_samples=1, generator=None, **options):
        """What lies behind the predictions of ``clip[:, n_context:]``, for figures: name -> tensor, the batch first.

        The names, those in ``explains``, say what: ``nats`` (B, T - n_context, h, w, n_codebooks), what each code
        costs; ``kl`` (B, T - 1, G, group_dim), nats of each number of the G groups of z; ``mu`` and ``future``
        (B, T - n_context, ...), the mean and what was drawn around it; ``motion`` (B, S, 1 + T - n_context, ...),
        motion features from the last given frame on.

        Args:
            clip: as for ``forward``. num_samples, generator: as for ``sample``, of priors that draw here.
            **options: sampler options.
        """
        return {}

    def sampler_options(self):
        """What ``sample`` takes beyond the common arguments, and ``pipe(..., **sampler)`` may pass -> dict of name ->
        SamplerOption, sorted. The kind follows from the default where ``sampler_ranges`` says nothing of it."""
        common = {"context", "n_frames", "num_samples", "generator", "progress"}
        found, ranges = inspect.signature(self.sample).parameters, self.sampler_ranges()
        options = {}
        for name in sorted(found.keys() - common):
            default = found[name].default
            kind = type(default) if isinstance(default, bool | int | float | str) else None
            options[name] = SamplerOption(**{"default": default, "kind": kind} | ranges.get(name, {}))
        return options

    def sampler_ranges(self):
        """name -> fields of the SamplerOption that the default in ``sample`` does not tell; a subclass says its own."""
        return {}

    def options_of(self, options, index, n_contexts, n_frames):
        """Sampler options of a batch of contexts -> those of context ``index`` when it is sampled alone.

        Args:
            options: name -> value. Values that hold one for each context are cut here: ``frame_times`` (B, n_frames);
                subclasses do so with their own.
        """
        times = options.get("frame_times")
        if times is not None and times.ndim == 2:
            options = options | {"frame_times": times[index : index + 1]}
        return options

    def check_context(self, n_context, n_total):
        """Refuse a context that is too short for the prior or leaves nothing to predict."""
        if n_context < self.min_context:
            raise ValueError(f"n_context: expected at least {self.min_context}, found {n_context}")
        if n_context >= n_total:
            raise ValueError(f"n_context: expected fewer than the clip's {n_total} frames, found {n_context}")


def check_widths(**lists):
    """Refuse lists (of a network's levels) that are empty or hold anything but whole numbers of at least 1, by name."""
    for name, values in lists.items():
        if not values or not all(is_whole(value, 1) for value in values):
            raise ValueError(f"{name}: expected whole numbers of at least 1, found {list(values)}")


def need_codes(latent_spec, who):
    """Refuse latents without codes."""
    if not latent_spec["codebook_sizes"]:
        found = "latents without any"
        if latent_spec["kind"] == "pixels":
            found = "continuous pixels (tokenizer.levels=256 makes codes of them)"
        raise MisfitError(f"latent_spec: {who} needs codes, found {found}", "codes")


def levels_for(latent_spec, fit, name, values, *beside, single=True):
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
                f"{width}; take at most {most}, {kept}"
            )
        logger.info("prior.%s=%s: cut to %s, for latents of %d x %d", name, list(values), kept, height, width)
    return [list(each[:most]) for each in (values, *beside)]


class no_progress:
    """Stands in for a progress bar when nobody watches."""

    def __init__(self, total=None):
        self.total = total

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        return False

    def update(self, n=1):
        """Do nothing."""
