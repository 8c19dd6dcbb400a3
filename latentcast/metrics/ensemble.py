"""Metrics of several sampled futures of one context: CRPS, iLPIPS and best of N."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import combinations

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from latentcast.shapes import Frames, Futures

from .frame import SAMPLES, VIDEOS, check_videos, mse, psnr, ssim
from .statistics import ClipValues, Indices, per_clip, summarize, videos_of

LEVELS = 127.5  # 8-bit levels a unit of frames in [-1, 1]
CHUNK = 2**19  # values that CRPS sorts at once
ESTIMATORS = ("standard", "fair")
PAIRS = ("ring", "all")
HIGHER_IS_BETTER = {"ssim": True, "psnr": True, "mse": False, "lpips": False}


@torch.no_grad()
def crps(
    samples: Futures, target: Frames, estimator: str = "standard", reduction: str = "mean"
) -> Float[Tensor, "B T"] | Frames:
    """Continuous ranked probability score of each frame on the 0 to 255 scale; lower is better.

    RVD (Yang et al. 2022), section 3.4: for each pixel and channel the integral over z of (F(z) - 1{y <= z})^2, where F
    is the empirical distribution of the S samples and y the truth. For that F it equals mean_s |x_s - y| minus half the
    mean of |x_s - x_r| over all pairs, which one sort gives. Frames are scaled to 0..255 and not rounded: the integral
    is exact, and for 8-bit frames it is the paper's sum over 256 levels.

    Args:
        samples: (B, S, T, C, H, W) in [-1, 1].
        target: (B, T, C, H, W) in [-1, 1].
        estimator: "standard", the paper's: pairs include a sample with itself (S^2 of them), which favours large S.
            "fair" (Ferro 2014): S (S - 1) pairs, unbiased for the distribution that was sampled, so it may be
            negative; needs S >= 2.
        reduction: "mean" over channels and pixels, or "none".
    Returns:
        (B, T), or the map (B, T, C, H, W) for "none".
    Raises:
        ValueError: unlike shapes, values outside [-1, 1], too few samples, an unknown estimator or reduction.
    """
    if estimator not in ESTIMATORS:
        raise ValueError(f"crps: expected an estimator of {ESTIMATORS}, found {estimator!r}")
    if reduction not in ("mean", "none"):
        raise ValueError(f"crps: expected a reduction of ('mean', 'none'), found {reduction!r}")
    samples, target = _check_samples("crps", samples, target)
    n_samples = samples.shape[1]
    if estimator == "fair" and n_samples < 2:
        raise ValueError("crps: expected at least 2 samples a clip for the fair estimator, found 1")
    n_pairs = n_samples * (n_samples - 1 if estimator == "fair" else n_samples)
    # Half the mean distance of pairs is this weighted sum of the sorted values.
    weights = torch.arange(1 - n_samples, n_samples, 2, dtype=samples.dtype, device=samples.device) / n_pairs

    scores = torch.empty_like(target, memory_format=torch.contiguous_format)
    n_pixels = max(1, CHUNK // n_samples)
    for clip, truth, score in zip(samples.flatten(2), target.flatten(1), scores.flatten(1)):
        chunks = (tensor.split(n_pixels, -1) for tensor in (clip, truth, score))
        for clip_SN, truth_N, score_N in zip(*chunks):
            # Weights sum to 0, so errors may be sorted in the place of samples: small numbers, less rounding.
            errors_NS = _sort((clip_SN - truth_N).T.contiguous())
            spread_N = (errors_NS * weights).sum(-1)
            torch.sub(errors_NS.abs_().mean(-1), spread_N, out=score_N)
    scores *= LEVELS
    return scores.mean((-3, -2, -1)) if reduction == "mean" else scores


@torch.no_grad()
def ilpips(samples: Futures, lpips: object = "alex", pairs: str = "ring") -> Float[Tensor, "B T"]:
    """Diversity of samples, inter-LPIPS: the mean LPIPS between samples of one context -> (B, T); 0 if all are equal.

    STDiff (Ye and Bilodeau 2024), supplement, equation S8. Its tables give 1000 times this value.

    Args:
        samples: (B, S, T, C, H, W) in [-1, 1], S >= 2.
        lpips: name of the network, "alex" or "vgg", or any distance with ``features(frames)`` and
            ``distance(features, features)`` -> (B, T). Features are computed once a sample.
        pairs: "ring", the paper's S pairs: each sample with the next, the last with the first. "all": the
            S (S - 1) / 2 pairs, which keeps the features of all samples in memory.
    Raises:
        ValueError: values outside [-1, 1], fewer than 2 samples, unknown pairs or network.
    """
    if pairs not in PAIRS:
        raise ValueError(f"ilpips: expected pairs of {PAIRS}, found {pairs!r}")
    samples = check_videos("ilpips: samples", samples, SAMPLES)
    if samples.shape[1] < 2:
        raise ValueError("ilpips: expected at least 2 samples a clip, found 1")
    lpips = _lpips(lpips, samples.device)
    return mean_of_pairs(map(lpips.features, samples.unbind(1)), lpips.distance, pairs)


def mean_of_pairs(features: Iterable, distance: Callable[..., Tensor], pairs: str = "ring") -> Float[Tensor, "B T"]:
    """The mean distance of pairs of samples, as ``ilpips`` chooses them; ``features``: those of one sample after
    another, of which "ring" keeps three at a time."""
    if pairs == "all":
        return torch.stack([distance(*pair) for pair in combinations(features, 2)]).mean(0)
    features = iter(features)
    first = before = next(features)
    total, n = 0, 1
    for found in features:
        total = total + distance(before, found)
        before, n = found, n + 1
    return (total + distance(first, before)) / n


class BestOfN:
    """Scores of each clip's best sample, the protocol of SVG, HAF-SVG and STDiff.

    For every clip and every metric on its own, the sample with the best mean over the predicted frames is taken, and
    its frames make the curve; then the mean over clips with its interval. Scores of all samples are kept (n_clips x S x
    T numbers a metric), frames are not. With torch.distributed, ranks may hold any share of the clips.

    Args:
        metrics: names ("ssim", "psnr", "mse", "lpips"), or name -> metric, which takes prediction and target
            (B, T, C, H, W) and returns (B, T), or is an ``LPIPS``. A name's part before "_" says which end is better:
            {"ssim_uniform": ..., "lpips_vgg": LPIPS("vgg")}.
        counts: also report the best of the first n samples for these n (HAF-SVG, Figure 7).
    """

    def __init__(
        self, metrics: Sequence[str] | Mapping[str, Callable] = ("ssim", "psnr", "lpips"), counts: Sequence[int] = ()
    ) -> None:
        if not isinstance(metrics, dict):
            named = {"ssim": ssim, "psnr": psnr, "mse": mse, "lpips": "alex"}
            metrics = {name: named.get(name) for name in metrics}
        for name, metric in metrics.items():
            if metric is None or name.split("_")[0] not in HIGHER_IS_BETTER:
                raise ValueError(f"best of N: expected metrics of {tuple(HIGHER_IS_BETTER)}, found {name!r}")
        if any(n < 1 for n in counts):
            raise ValueError(f"best of N: expected positive counts of samples, found {min(counts)}")
        self.metrics = dict(metrics)
        self.counts = sorted(counts)
        self.values = {name: ClipValues() for name in metrics}

    def update(self, samples: Futures, target: Frames, clips: Indices | None = None) -> None:
        """Add ``samples`` and ``target`` of B clips.

        ``clips`` are their indices in the data set; ranks that share one should give them (see ``ClipValues``).
        """
        self.add(self.score(samples, target), clips)

    @torch.no_grad()
    def score(self, samples: Futures, target: Frames) -> dict[str, Float[Tensor, "B S T"]]:
        """Scores by name; of samples drawn in chunks, concatenate them along S and ``add`` them."""
        samples, target = _check_samples("best of N", samples, target)
        scores = {}
        for name, metric in self.metrics.items():
            if isinstance(metric, str):
                metric = self.metrics[name] = _lpips(metric, samples.device)
            if hasattr(metric, "features"):
                truth = metric.features(target)
                by_sample = [metric.distance(metric.features(sample), truth) for sample in samples.unbind(1)]
            else:
                by_sample = [metric(sample, target) for sample in samples.unbind(1)]
            scores[name] = torch.stack(by_sample, 1)
        return scores

    def add(self, scores: Mapping[str, Float[Tensor, "B S T"]], clips: Indices | None = None) -> None:
        """Add clips by their scores, of a former ``score``."""
        for name, values in self.values.items():
            if self.counts and scores[name].shape[1] < self.counts[-1]:
                found = scores[name].shape[1]
                raise ValueError(f"best of N: expected at least {self.counts[-1]} samples a clip, found {found}")
            values.update(scores[name], clips)

    def compute(self, video_of: Mapping[int, int] | None = None, gather: bool = True) -> dict[str, dict]:
        """name -> plain numbers; every rank must call it, unless without ``gather``, of this rank's clips alone.
        ``video_of``: clip -> the video it comes from.

        ``mean``, ``ci95``, ``n_clips``, ``n_videos``, ``per_frame`` and ``per_frame_ci95`` (see
        ``statistics.summarize``) of the best samples, ``clips`` with ``videos`` and ``per_clip`` (the best sample's
        mean), ``best`` and ``worst`` (index of the sample for each clip), ``n_samples``, and summaries
        ``mean_of_samples`` and ``best_of`` (str(n) -> best of the first n).
        """
        gathered = {name: values.gather() if gather else values for name, values in self.values.items()}
        return {name: self._compute(name, values, video_of) for name, values in gathered.items()}

    def _compute(self, name, gathered, video_of):
        scores, videos = gathered.values, videos_of(gathered.clips, video_of)
        sign = 1 if HIGHER_IS_BETTER[name.split("_")[0]] else -1
        quality = sign * scores.mean(-1)
        rows = np.arange(len(scores))

        def best_of(n):
            return scores[rows, quality[:, :n].argmax(1)]

        best = best_of(scores.shape[1])
        return {
            **summarize(best, videos),
            **per_clip(gathered.clips, best, videos),
            "best": quality.argmax(1).tolist(),
            "worst": quality.argmin(1).tolist(),
            "n_samples": scores.shape[1],
            "mean_of_samples": summarize(scores.mean(1), videos),
            "best_of": {str(n): summarize(best_of(n), videos) for n in self.counts},
        }


def _check_samples(name, samples, target):
    """Both as floats of one type, if they belong together."""
    samples = check_videos(f"{name}: samples", samples, SAMPLES)
    target = check_videos(f"{name}: target", target)
    if samples.shape[:1] + samples.shape[2:] != target.shape:
        raise ValueError(
            f"{name}: expected samples {SAMPLES} of a target {VIDEOS}, found {tuple(samples.shape)} "
            f"and {tuple(target.shape)}"
        )
    return samples, target.to(samples.dtype)


def _lpips(lpips, device):
    if not isinstance(lpips, str):
        return lpips
    from . import LPIPS  # only on demand: it reads weights

    return LPIPS(lpips).to(device)


def _sort(values):
    """Ascending along the last axis. NumPy's vectorised sort is about five times as fast as torch's on the CPU."""
    if values.device.type == "cpu":
        return torch.from_numpy(np.sort(values.numpy(), -1))
    return values.sort(-1).values
