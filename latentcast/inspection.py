"""From trained models and clips to figures: what ``latentcast/figures`` draws is computed here, by public interfaces.

    subject = Subject(ShownClips.of(dataset, 4), pipe=pipe)
    for name, drawing in draw(subject):
        write_drawing(folder / name, drawing)

``FIGURES`` lists them by name; ``reasons`` says which of them a model has not, and why. Previews of trainings,
tools/figures.py and whoever else shows a model go through it.
"""

import functools
import logging
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch

from latentcast import figures
from latentcast.data.base import ShownClips
from latentcast.layers.gaussian import kl_of_numbers, scale_moments
from latentcast.metrics import BestOfN, crps, mse, psnr
from latentcast.metrics.baselines import copy_last_frame
from latentcast.metrics.frame import WINDOWS, ssim
from latentcast.metrics.perplexity import histogram, perplexity
from latentcast.metrics.statistics import ClipValues, summarize
from latentcast.modeling import eval_mode
from latentcast.priors.base import as_keyword
from latentcast.saved import STAGES
from latentcast.targets import nearest

logger = logging.getLogger("latentcast")

N_ROWS = 3  # clips on sheets with several rows a clip
N_DIVERSE = 4  # samples by which a group of z or a motion is judged
ROLLOUT = 5  # horizons of the training that ``drift`` predicts
SMALLEST_LPIPS = 31  # pixels
COPY, MODEL = "copy last frame", "model"
LEVELS = 127.5  # 8-bit levels a unit of frames in [-1, 1]


class Subject:
    """A tokenizer, a pipeline, or both, and clips to look at them with. What several figures need is computed once,
    when it is first asked for.

    Args:
        clips: ShownClips; the first ``n_context`` frames of each are given to the prior.
        tokenizer: a FrameTokenizer; None: the pipeline's.
        pipe: a VideoPredictionPipeline, for figures of the prior.
        n_context: None: the pipeline's.
        num_samples: futures of each clip.
        sampler: options of the prior's sampler.
        seed: of the samples.
        label: "step 500: held-out clips", say, for titles, after the name of the model's class.
        counts: for each codebook how often its codes occur in more data than the clips, (K,); or a function that
            counts. None: the clips' own.
        histories: stage -> rows (step, name, value) of its metrics file.
        results: what tools/evaluate.py found, for the curves; None: measured on the clips.
        maps: (who -> (H, W), title), the evaluation's maps of CRPS.
        longer: function from a number of frames to ShownClips of as many, or of as many as there are.
    """

    def __init__(
        self,
        clips,
        tokenizer=None,
        pipe=None,
        n_context=None,
        *,
        num_samples=4,
        sampler=None,
        seed=0,
        label="",
        counts=None,
        histories=None,
        results=None,
        maps=None,
        longer=None,
    ):
        self.clips, self.pipe, self.label = clips, pipe, label
        self.tokenizer = tokenizer if tokenizer is not None or pipe is None else pipe.tokenizer
        self.prior = None if pipe is None else pipe.prior
        self.n_context = n_context or (pipe and pipe.config.n_context) or 1
        self.sampler, self.seed = dict(sampler or {}), seed
        self.num_samples = 1 if self.prior is not None and self.prior.deterministic else num_samples
        self.histories, self.results, self.maps = histories or {}, results, maps
        self._counts, self._longer = counts, longer
        self._explained = {}

    @property
    def names(self):
        return self.clips.names

    def title(self, what, stage="prior"):
        """A figure's title: what it shows, of which model, and the label."""
        model = self.tokenizer if stage == "tokenizer" else self.prior
        of = [] if model is None else [type(model).__name__]
        return f"{what} · {', '.join(of + [self.label] * bool(self.label))}"

    # Stage one

    @functools.cached_property
    def encoded(self):
        """TokenizerOutput of the clips."""
        with torch.no_grad(), eval_mode(self.tokenizer):
            return self.tokenizer.encode_chunked(self.clips.frames.to(self.tokenizer.dtype))

    @functools.cached_property
    def reconstruction(self):
        """(N, T, C, H, W)"""
        return self.decoded(self.encoded.latents)

    def decoded(self, latents):
        """Latents or codes (N, T, ...) -> frames in [-1, 1]."""
        with torch.no_grad(), eval_mode(self.tokenizer):
            return self.tokenizer.decode_chunked(latents).float().clamp(-1, 1)

    @functools.cached_property
    def counts(self):
        """For each codebook how often its codes occur, (K,) int64."""
        counts = self._counts() if callable(self._counts) else self._counts
        return (
            count_codes(self.encoded.codes, self.tokenizer.latent_spec["codebook_sizes"]) if counts is None else counts
        )

    # Stage two

    @property
    def context(self):
        return self.clips.frames[:, : self.n_context]

    @property
    def truth(self):
        return self.clips.frames[:, self.n_context :]

    def predict(self, context, n_frames, num_samples=1, clips=None, **options):
        """Futures of given frames, the first ones of ``clips`` (None: the subject's), by the subject's sampler and seed
        -> (N, S, T, ...) on the CPU."""
        generator = torch.Generator().manual_seed(self.seed)
        settings = {"num_samples": num_samples, "generator": generator, "value_range": (-1, 1)}
        options = self.sampler | options
        n_told = self.prior.told_frames(context.shape[1], n_frames, **options)
        told = (clips or self.clips).told(self.prior.conditions, len(context), n_told)
        return self.pipe(context, n_frames, conditions=told, **settings, **options).frames.cpu()

    @functools.cached_property
    def predicted(self):
        """What the prior predicts of the clips, not decoded: (N, S, T, ...)."""
        return self.predict(self.context, self.truth.shape[1], self.num_samples, output_type="latent")

    @functools.cached_property
    def samples(self):
        """(N, S, T, C, H, W)"""
        with torch.no_grad(), eval_mode(self.prior, self.tokenizer):
            return self.pipe.decode(self.predicted.to(self.prior.device)).cpu()

    @functools.cached_property
    def scores(self):
        """(N, S) PSNR of the samples, dB; None where a sample is not finite."""
        if not self.samples.isfinite().all():
            return None
        return torch.stack([psnr(sample, self.truth).mean(1) for sample in self.samples.unbind(1)], 1)

    def explained(self, n_clips=None, num_samples=1):
        """``prior.explain`` of the clips, or of the first ``n_clips``."""
        if (n_clips, num_samples) not in self._explained:
            self._explained[n_clips, num_samples] = self._explain(n_clips, num_samples)
        return self._explained[n_clips, num_samples]

    def _explain(self, n_clips, num_samples):
        generator = torch.Generator().manual_seed(self.seed)
        frames = self.clips.frames[:n_clips]
        longest = self.prior.config.get("n_frames") if self.prior.accepts == "codes" else None
        with torch.no_grad(), eval_mode(self.prior, self.tokenizer):
            clip = self.pipe.encode(frames[:, :longest])
            told = self.clips.told(self.prior.conditions, len(clip), clip.shape[1])
            settings = {"num_samples": num_samples, "generator": generator, **as_keyword(told)}
            found = self.prior.explain(clip, self.n_context, **settings, **self.sampler)
        return {name: values.float().cpu() for name, values in found.items()}

    def longer(self, n_frames):
        """ShownClips of as many frames, or of as many as there are."""
        return self.clips if self._longer is None else self._longer(n_frames)


def count_codes(codes, sizes):
    """Codes (..., n) -> for each codebook how often each of its codes occurs, (K,) int64."""
    return [histogram(book.flatten(), size) for book, size in zip(codes.unbind(-1), sizes)]


# The figures -------------------------------------------------------------------------------------------------------


def reconstructions(subject):
    quality = None
    if subject.reconstruction.isfinite().all():
        quality = psnr(subject.reconstruction, subject.clips.frames.float())
    shown = slice(len(subject.names) if subject.clips.frames.shape[1] == 1 else N_ROWS)
    return figures.reconstructions(
        subject.clips.frames[shown],
        subject.reconstruction[shown],
        subject.names[shown],
        None if quality is None else quality[shown],
        subject.title("Reconstructions", "tokenizer"),
    )


def code_frequencies(subject):
    return figures.code_frequencies(subject.counts, subject.title("Code frequencies", "tokenizer"), _books(subject))


def code_maps(subject):
    codes, frames, title = subject.encoded.codes, subject.clips.frames, subject.title("Codes", "tokenizer")
    if frames.shape[1] == 1:
        return figures.code_maps([("", "", frames[:, 0], codes[:, 0], None)], title, "clip")
    return figures.code_maps(_coded_clips(subject), title)


def change_masks(subject):
    return figures.change_masks(_coded_clips(subject), subject.title("Which codes change", "tokenizer"))


def _coded_clips(subject):
    """Two clips with their codes, or where a prior predicts codes one and what was predicted of it."""
    codes, frames = subject.encoded.codes, subject.clips.frames
    if subject.prior is None or subject.prior.accepts != "codes":
        return [(name, "", frames[i], codes[i], None) for i, name in enumerate(subject.names[:2])]
    n = subject.n_context
    predicted = torch.cat([codes[0, :n].cpu(), subject.predicted[0, 0].cpu()])
    shown = torch.cat([frames[0, :n], subject.samples[0, 0]])
    name = subject.names[0]
    return [(name, "truth", frames[0], codes[0], None), (name, "prediction", shown, predicted, n)]


def usage(subject):
    return figures.usage(subject.histories["tokenizer"], subject.title("Use of the codebooks", "tokenizer"))


def layers(subject):
    tokenizer, frames, n = subject.tokenizer, subject.clips.frames, subject.n_context
    shown = [(subject.names[0], frames[0], subject.encoded.codes[0], None)]
    bits = [math.log2(value) for value in _perplexities(subject)]
    cost = "the entropy of its codes"
    if subject.prior is not None and subject.prior.accepts == "codes":
        codes = torch.cat([subject.encoded.codes[0, :n].cpu(), subject.predicted[0, 0].cpu()])
        shown.append(("prediction", frames[0], codes, n))
        if "nats" in subject.prior.explains:
            bits = (subject.explained()["nats"].mean((0, 1, 2, 3)) / math.log(2)).tolist()
            cost = "what the prior needs for them"
    elif len(frames) > 1:
        shown.append((subject.names[1], frames[1], subject.encoded.codes[1], None))
    names, truth, codes, given = zip(*shown)
    codes, truth = torch.stack(codes).to(tokenizer.device), torch.stack(truth).float()
    with torch.no_grad(), eval_mode(tokenizer):
        depths = range(1, codes.shape[-1] + 1)
        partial = torch.stack([tokenizer.decode(codes, n_layers=d).float().clamp(-1, 1).cpu() for d in depths], 1)
    quality = None
    if partial.isfinite().all():
        quality = torch.stack([psnr(frames, truth) for frames in partial.unbind(1)], 1)
    title = subject.title(f"Layer by layer; bits: {cost}", "tokenizer")
    return figures.layers(truth, partial, names, quality, title, bits, list(given))


def latents(subject):
    values = subject.encoded.latents.float().movedim(2, 0).flatten(1).cpu()
    kl = None
    if subject.encoded.posterior is not None:
        factor = subject.tokenizer.latent_spec["scaling_factor"]
        moments = scale_moments(subject.encoded.posterior.float(), 1 / factor)  # on the scale of the prior N(0, 1)
        kl = kl_of_numbers(moments).mean((0, 1, 3, 4)).cpu()
    return figures.latents(values.mean(1), values.std(1, correction=0), kl, subject.title("Latents", "tokenizer"))


def futures(subject):
    shown, scores = slice(N_ROWS), subject.scores
    return figures.futures(
        subject.context[shown],
        subject.samples[shown],
        subject.truth[shown],
        None if scores is None else scores.argmax(1)[shown],
        subject.names[shown],
        subject.clips.fps,
        subject.title("Futures"),
        None if scores is None else scores[shown],
    )


def curves(subject):
    metrics = ("psnr", "ssim", "lpips", "crps")
    if subject.results is not None:
        protocol = subject.results["protocol"]
        results = {subject.results["model"]["name"]: subject.results["metrics"], **subject.results["baselines"]}
        title = f"protocol {protocol['name']}, {subject.results['data']['n_clips']} clips"
        return figures.curves(results, metrics, f"Predicted frames: {title}")
    samples, truth = subject.samples, subject.truth.float()
    last = copy_last_frame(subject.context.float(), truth.shape[1])[:, None]
    videos = subject.clips.video_numbers
    results = {who: _measured(futures, truth, videos) for who, futures in ((MODEL, samples), (COPY, last))}
    title = f"Best of {samples.shape[1]} samples, {_count(truth)}"
    return figures.curves(results, metrics, subject.title(title))


def _measured(samples, truth, videos):
    """metric -> entry with a number for each frame, of the best sample of each clip; CRPS of all. Of one process: the
    others of a training draw nothing."""
    size, video_of = min(truth.shape[-2:]), dict(enumerate(videos))
    bad, samples = ~samples.isfinite(), _finite(samples)
    names = {"psnr": psnr} | ({"ssim": ssim} if size >= WINDOWS["gaussian"] else {})
    best_of_n = BestOfN(names)
    best_of_n.update(samples, truth, range(len(truth)))
    found = best_of_n.compute(video_of, gather=False)
    if size >= SMALLEST_LPIPS and truth.shape[-3] in (1, 3):
        perceptual = BestOfN(("lpips",))
        try:
            perceptual.update(samples, truth, range(len(truth)))
            found |= perceptual.compute(video_of, gather=False)
        except OSError as error:
            logger.info("no LPIPS of the curves: %s", error)
    scores = ClipValues()
    scores.update(crps(samples, truth), range(len(truth)))
    found["crps"] = scores.compute(video_of, gather=False)
    for frame in bad.any(-1).any(-1).any(-1).any(0).any(0).nonzero().flatten().tolist():  # not known there
        for entry in found.values():
            entry["per_frame"][frame] = math.nan
            if entry["per_frame_ci95"]:
                entry["per_frame_ci95"][frame] = [math.nan] * 2
    return found


def _finite(frames):
    """Frames as metrics take them; what is not finite is grey."""
    return frames.float().nan_to_num(0, 0, 0).clamp(-1, 1)


def crps_maps(subject):
    if subject.maps is not None:
        maps, title = subject.maps
        return figures.crps_maps(maps, f"CRPS: {title}")
    truth = subject.truth.float()
    last = copy_last_frame(subject.context.float(), truth.shape[1])[:, None]
    frames = sorted({0, (truth.shape[1] - 1) // 2, truth.shape[1] - 1})
    maps = {}
    for who, samples in ((f"{subject.num_samples} samples", subject.samples), (COPY, last)):
        scores = crps(_finite(samples), truth, reduction="none")
        scores[~samples.isfinite().all(1)] = math.nan
        maps[who] = scores.mean((0, 2))[frames]
    title = subject.title(f"CRPS, mean over {_count(truth)}")
    return figures.crps_maps(maps, title, [f"frame +{i + 1}" for i in frames])


def losses(subject):
    bits = subject.explained()["nats"].mean(0) / math.log(2)
    entropies = [math.log2(value) for value in _perplexities(subject)]
    noun = "layer" if subject.tokenizer.has_layers else "codebook"
    sizes, title = subject.prior.config.latent_spec["codebook_sizes"], subject.title("What a code costs")
    return figures.losses(bits, entropies, sizes, subject.n_context, title, noun)


def kl_groups(subject):
    from latentcast.priors.recurrent_vae import ACTIVE

    kl = subject.explained()["kl"].mean(0)
    return figures.kl_groups(kl, subject.n_context, ACTIVE, subject.title("KL of the groups of z"))


def z_groups(subject):
    n_groups, context = subject.explained()["kl"].shape[2], subject.context[:1]
    varied, n_frames = {}, subject.truth.shape[1]
    for group in range(1, n_groups + 1):
        fixed = {other: 0 for other in range(1, n_groups + 1) if other != group}
        label = f"z{group} drawn, the rest 0" if fixed else "z1 drawn"
        varied[label] = subject.predict(context, n_frames, N_DIVERSE, z_groups=fixed)[0]
    if n_groups > 1:
        varied["all of z drawn"] = subject.predict(context, n_frames, N_DIVERSE)[0]
    return figures.z_groups(context[0], varied, subject.truth[0], subject.title("Groups of z, one at a time"))


def motion(subject):
    features = subject.explained(num_samples=N_DIVERSE)["motion"]  # (N, S, 1 + T, ...)
    axes = tuple(range(3, features.ndim)) if features.ndim > 3 else (-1,)

    def rms(values, axes):
        return values.square().mean(axes).sqrt()

    spread = features.std(1, correction=0)  # (N, 1 + T, ...)
    change = features.mean(1) - features[:, :1, 0]
    over = tuple(axis - 1 for axis in axes)
    title = subject.title("Motion")
    chart = figures.motion_spread(rms(spread, over), rms(change, over), range(features.shape[2]), title)
    n_frames, context = subject.truth.shape[1], subject.context[:1]
    seeded = [[subject.predict(context, n_frames, motion_seed=m, image_seed=i)[0, 0] for i in (0, 1)] for m in (0, 1)]
    seeded = torch.stack([torch.stack(row) for row in seeded])
    return figures.motion(chart, context[0], seeded, subject.truth[0], subject.title("Seeds of motion and of images"))


def residual(subject):
    n = min(2, len(subject.names))
    found = subject.explained(n)
    frames = found
    if subject.prior.accepts != "pixels":
        with torch.no_grad(), eval_mode(subject.tokenizer):
            device = subject.tokenizer.device
            frames = {
                name: subject.pipe.decode(values[:, None].to(device))[:, 0].cpu() for name, values in found.items()
            }
    return figures.residual(
        *(subject.context[:n], frames["mu"], frames["future"], subject.truth[:n]),
        *(subject.names[:n], subject.title("Mean and residual")),
    )


def decoding(subject):
    n = min(2, len(subject.names))
    found = subject.explained(n)
    steps = subject.pipe.decode(found["decoding"][:, None].long().to(subject.prior.device))[:, 0].cpu()
    known = found["depth"] / found["decoding"].shape[-1]
    return figures.decoding(subject.truth[:n, 0], steps, known, subject.names[:n], subject.title("Step by step"))


def half_steps(subject):
    future = subject.predict(subject.context[:2], 2 * subject.truth.shape[1], fps_multiplier=2)[:, 0]
    parts = subject.context[:2], future, subject.truth[:2], subject.names[:2]
    return figures.half_steps(*parts, subject.title("Between the frames"))


def drift(subject):
    horizon, n = subject.truth.shape[1], subject.n_context
    n_frames = ROLLOUT * horizon
    clips = subject.longer(n + n_frames)
    context, truth = clips.frames[:, :n].float(), clips.frames[:, n : n + n_frames].float()
    future = subject.predict(context, n_frames, clips=clips)[:, 0]
    known = truth.shape[1]
    pairs = {MODEL: future[:, :known], COPY: copy_last_frame(context, known)}
    errors = {}
    for who, frames in pairs.items():
        rmse = mse(_finite(frames), truth).sqrt() * LEVELS
        rmse[~frames.isfinite().flatten(2).all(2)] = math.nan
        errors[who] = summarize(rmse.numpy(), clips.video_numbers)

    def statistics(frames):
        before = torch.cat([context[:, -1:], frames[:, :-1]], 1)
        contrast = frames.std((2, 3, 4), correction=0).mean(0) * LEVELS
        return contrast, (frames - before).abs().mean((0, 2, 3, 4)) * LEVELS

    names = ("contrast of a frame, of 255", "change from frame to frame, of 255")
    found = {"truth": statistics(truth), MODEL: statistics(future)}
    numbers = {name: {who: values[i] for who, values in found.items()} for i, name in enumerate(names)}
    title = subject.title(f"{ROLLOUT} times the horizon, {_count(truth)}")
    if known < n_frames:
        title += f" (true frames: {known})"
    chart = figures.drift(errors, horizon, numbers, n, title)
    return figures.rollout(chart, context[0], future[0], truth[0], horizon)


def _training(stage, subject):
    return figures.training_curves(
        subject.histories[stage], subject.title(f"Training, {stage}", stage), f"training_{stage}"
    )


def _count(clips):
    return "1 clip" if len(clips) == 1 else f"{len(clips)} clips"


def _books(subject):
    noun = "layer" if subject.tokenizer.has_layers else "codebook"
    return [f"{noun} {number}" for number in range(1, len(subject.counts) + 1)]


def _perplexities(subject):
    return [float(perplexity(counts)) for counts in subject.counts]


# Which of them there are -------------------------------------------------------------------------------------------


def _tokenizer_lacks(subject):
    tokenizer = subject.tokenizer
    if tokenizer is None:
        return "there is no tokenizer"
    if tokenizer.latent_spec["kind"] == "pixels":
        return f"{type(tokenizer).__name__} hands on the frames as they are"
    return None


def _codes_lack(subject):
    lack = _tokenizer_lacks(subject)
    return lack or (None if subject.tokenizer.is_discrete else f"{type(subject.tokenizer).__name__} has no codes")


def _changes_lack(subject):
    one = "the clips have a single frame, and none before it" if subject.clips.frames.shape[1] == 1 else None
    return _codes_lack(subject) or one


def _layers_lack(subject):
    lack = _codes_lack(subject)
    return lack or (None if subject.tokenizer.has_layers else f"{type(subject.tokenizer).__name__} has no layers")


def _latents_lack(subject):
    lack = _tokenizer_lacks(subject)
    discrete = subject.tokenizer is not None and subject.tokenizer.is_discrete
    return lack or (f"{type(subject.tokenizer).__name__} is discrete: see code_frequencies" if discrete else None)


def _history_lacks(subject, stage, needed=""):
    rows = subject.histories.get(stage, ())
    if any(needed in name for _, name, _ in rows):
        return None
    what = f"figures of {needed.strip('/_')}" if rows else "metrics"
    training = "joint training" if stage == "joint" else f"training of the {stage}"
    return f"there are no {what} of a {training}"


def _prior_lacks(subject):
    if subject.prior is None:
        return "there is no prior"
    if subject.truth.shape[1] < 1:
        return f"the clips have {subject.clips.frames.shape[1]} frames, and {subject.n_context} are given to the prior"
    return None


def _lacks(subject, explains=None, option=None):
    lack = _prior_lacks(subject)
    if lack:
        return lack
    kind = type(subject.prior).__name__
    if explains and explains not in subject.prior.explains:
        return f"{kind} has no {explains}"
    expected, found = subject.prior.clip_frames, subject.clips.frames.shape[1]
    if explains and expected and found < expected:
        return f"{kind}: its {explains} are of clips of {expected} frames, and these have {found}"
    if option and option not in subject.prior.sampler_options():
        return f"{kind}: its sampler takes no {option}"
    return None


@dataclass(frozen=True)
class Kind:
    """A figure by name.

    Attributes:
        stage: "tokenizer" or "prior", whose figure it is.
        draw: Subject -> Drawing.
        lacks: Subject -> why it has no such figure, or None.
        when: "preview": a training draws it with every preview; "end": at its end; "asked": it takes long.
        of_codes: that of a tokenizer, which a prior over codes has, too.
    """

    stage: str
    draw: Callable
    lacks: Callable
    when: str = "preview"
    of_codes: bool = False


def _of_prior(draw, when, explains=None, option=None):
    return Kind("prior", draw, functools.partial(_lacks, explains=explains, option=option), when)


FIGURES = {
    "reconstructions": Kind("tokenizer", reconstructions, _tokenizer_lacks),
    "code_frequencies": Kind("tokenizer", code_frequencies, _codes_lack),
    "code_maps": Kind("tokenizer", code_maps, _codes_lack, of_codes=True),
    "change_masks": Kind("tokenizer", change_masks, _changes_lack, of_codes=True),
    "usage": Kind("tokenizer", usage, lambda subject: _history_lacks(subject, "tokenizer", "/usage_"), "asked"),
    "layers": Kind("tokenizer", layers, _layers_lack, of_codes=True),
    "latents": Kind("tokenizer", latents, _latents_lack),
    "futures": _of_prior(futures, "preview"),
    "curves": _of_prior(curves, "end"),
    "crps_maps": _of_prior(crps_maps, "end"),
    "losses": _of_prior(losses, "preview", explains="nats"),
    "kl_groups": _of_prior(kl_groups, "preview", explains="kl"),
    "z_groups": _of_prior(z_groups, "end", "kl", "z_groups"),
    "motion": _of_prior(motion, "end", "motion", "motion_seed"),
    "residual": _of_prior(residual, "end", "mu"),
    "decoding": _of_prior(decoding, "end", "decoding"),
    "half_steps": _of_prior(half_steps, "asked", option="fps_multiplier"),
    "drift": _of_prior(drift, "asked"),
    **{
        f"training_{stage}": Kind(
            "prior" if stage == "joint" else stage,
            functools.partial(_training, stage),
            functools.partial(_history_lacks, stage=stage),
            "asked",
        )
        for stage in STAGES
    },
}


def check_names(names):
    """Refuse names of figures that are not known, with the nearest one that is."""
    for name in names:
        if name not in FIGURES:
            raise ValueError(f"figure {name!r}: not known{nearest(name, FIGURES)}")


def reasons(subject, names=None):
    """name -> why the subject has no such figure, or None where it has; all figures, or the named ones.

    Raises:
        ValueError: an unknown name.
    """
    names = FIGURES if names is None else names
    check_names(names)
    return {name: FIGURES[name].lacks(subject) for name in names}


def of_training(subject, stage, end=False, made=False):
    """The names of the figures that a training of ``stage`` draws; at its ``end`` more; without those ``made``."""
    when = ["preview"] * (not made) + ["end"] * end
    codes = subject.prior is not None and subject.prior.accepts == "codes"
    kinds = FIGURES.items()
    return [n for n, kind in kinds if kind.when in when and (kind.stage == stage or (codes and kind.of_codes))]


def draw(subject, names=None, failed=None):
    """Draw the figures that the subject has, all or the named ones -> pairs of name and Drawing, one by one.

    Args:
        failed: called with name and error where drawing one fails, and the others are drawn; None: it is raised.
    """
    for name, lack in reasons(subject, names).items():
        if lack is not None:
            continue
        try:
            yield name, FIGURES[name].draw(subject)
        except Exception as error:
            if failed is None:
                raise
            failed(name, error)


__all__ = ["FIGURES", "Kind", "ShownClips", "Subject", "check_names", "count_codes", "draw", "of_training", "reasons"]
