"""Means over clips with 95 % confidence intervals, over all ranks of torch.distributed; the paired bootstrap.

Values of one clip, its frames and samples, are averaged first, for they are not independent. Nor are clips of one
video: what is independent is the G videos. The interval is mean +- t e, with t the 97.5 % quantile of Student's t with
G - 1 degrees of freedom and e the cluster-robust standard error (Liang and Zeger 1986; Cameron and Miller 2015, section
II): e^2 = G / (G - 1) / n^2 times the sum over videos of the squared sum of their clips' deviations from the mean over
all n clips. Where every clip is a video of its own e is s / sqrt(n), s the sample standard deviation. One video has no
interval: None.
"""

from collections.abc import Mapping, Sequence

import numpy as np
import torch
import torch.distributed as dist
from jaxtyping import Float, Shaped
from scipy.special import stdtrit
from torch import Tensor

from latentcast.shapes import Numbers

Indices = Sequence[int] | np.ndarray | Tensor  # of clips in a data set, or of their videos


class ClipValues:
    """What a metric gives for each clip: (T,) say, or (S, T). Kept in float64 on the CPU, so figures are exact however
    the clips are batched or shared among ranks.

    Ranks share their clips when ``gather`` or ``compute`` is called, which every rank must do. A clip that several of
    them hold counts once, since ``DistributedSampler`` repeats clips to fill the last batch.
    """

    def __init__(self) -> None:
        self._rows = {}  # clip -> float64 array
        self._counted = False

    def __len__(self):
        return len(self._rows)

    @property
    def clips(self) -> list[int]:
        """The clips' indices, ascending."""
        return sorted(self._rows)

    @property
    def values(self) -> Float[np.ndarray, "n_clips ..."]:
        """float64, in the order of ``clips``."""
        if not self._rows:
            raise ValueError("expected at least one clip, found none")
        return np.stack([self._rows[clip] for clip in self.clips])

    def update(self, values: Numbers, clips: Indices | None = None) -> None:
        """Add ``values`` (B, ...) of the clips with the indices ``clips`` (B,) in the data set.

        Without ``clips`` they are counted as they come, and rank after rank.

        Raises:
            ValueError: NaN or infinite values, another shape than before, a clip that was there, or indices given for
                some clips only.
        """
        values = torch.as_tensor(values).detach().cpu().double().numpy().copy()
        if not np.isfinite(values).all():
            raise ValueError("expected finite values of every clip, found NaN or infinity")
        counted = clips is None
        if self._rows and counted != self._counted:
            raise ValueError("expected the indices of all clips or of none, found some with and some without")
        clips = range(len(self), len(self) + len(values)) if counted else [int(clip) for clip in clips]
        if len(clips) != len(values):
            raise ValueError(f"expected an index for each of {len(values)} clips, found {len(clips)}")
        new = set()
        for clip in clips:
            if clip in self._rows or clip in new:
                raise ValueError(f"expected each clip once, found clip {clip} again")
            new.add(clip)
        shape = next(iter(self._rows.values())).shape if self._rows else values.shape[1:]
        if values.shape[1:] != shape:
            raise ValueError(f"expected values of shape {shape} for each clip, found {values.shape[1:]}")
        self._counted = counted
        self._rows.update(zip(clips, values))

    def gather(self) -> "ClipValues":
        """A new ClipValues with the clips of all ranks."""
        merged = ClipValues()
        for values in _all_ranks(self):
            if not values:
                continue
            new = [clip for clip in values.clips if values._counted or clip not in merged._rows]
            if new:
                merged.update(np.stack([values._rows[clip] for clip in new]), None if values._counted else new)
        return merged

    def compute(self, video_of: Mapping[int, int] | None = None, gather: bool = True) -> dict:
        """``summarize`` of all ranks' values, or without ``gather`` of this one's alone, and ``per_clip``;
        ``video_of``: clip -> the video it comes from."""
        merged = self.gather() if gather else self
        videos = videos_of(merged.clips, video_of)
        return summarize(merged.values, videos) | per_clip(merged.clips, merged.values, videos)


def videos_of(clips: Sequence[int], video_of: Mapping[int, int] | None = None) -> list[int]:
    """The video of each clip; without the mapping ``video_of`` each clip is a video of its own."""
    return list(clips) if video_of is None else [video_of[clip] for clip in clips]


def summarize(values: Numbers, videos: Indices | None = None) -> dict:
    """Plain numbers of ``values`` (n_clips,) or (n_clips, T).

    Args:
        videos: (n_clips,) numbers of the videos that the clips come from; None: each from one of its own.
    Returns:
        ``mean``, ``ci95`` ([low, high]; None for one video), ``n_clips`` and ``n_videos``; for (n_clips, T) also
        ``per_frame`` (T means over clips) and ``per_frame_ci95`` (T intervals), the curves of HAF-SVG, Figure 6.
    """
    values = np.asarray(values, dtype=np.float64)
    groups = _groups(len(values), videos)
    mean, interval = _mean_ci95(values.reshape(len(values), -1).mean(1), groups)
    summary = {"mean": mean, "ci95": interval, "n_clips": len(values), "n_videos": int(groups.max()) + 1}
    if values.ndim == 2:
        means, intervals = _mean_ci95(values, groups)
        summary |= {"per_frame": means, "per_frame_ci95": intervals}
    return summary


def per_clip(clips: Sequence[int], values: Shaped[np.ndarray, "n_clips ..."], videos: Sequence[int]) -> dict[str, list]:
    """{"clips": indices, "videos": of each, "per_clip": means}: what ``paired_bootstrap`` needs of a run."""
    means = values.reshape(len(values), -1).mean(1)
    return {"clips": list(clips), "videos": list(videos), "per_clip": means.tolist()}


def paired_bootstrap(
    first: Numbers,
    second: Numbers,
    n_resamples: int = 10_000,
    seed: int = 0,
    videos: Indices | None = None,
) -> dict:
    """Bootstrap of the mean difference of two runs over the same clips.

    Videos are drawn with replacement, each with all of its clips, and the mean of ``first - second`` over the clips
    drawn is taken, ``n_resamples`` times. Where all differences have one sign, so have the resampled means, of however
    few videos. The p-value is therefore kept at 2 ** (1 - n_videos) or above, the least that an exact test over the
    signs of the videos' differences can give.

    Args:
        first, second: (n_clips,) values, the same clips in the same order.
        videos: (n_clips,) numbers of the videos that the clips come from; None: each from one of its own.
    Returns:
        ``difference``, ``ci95`` ([low, high], percentiles), ``p_value`` (two-sided: twice the share of resampled
        differences on the far side of zero, counting the observed one, so at least 2 / (n_resamples + 1); and at least
        2 ** (1 - n_videos)), ``n_clips``, ``n_videos``.
    Raises:
        ValueError: other clips on the two sides, NaN or infinity, or clips of one video alone.
    """
    first, second = (np.asarray(values, dtype=np.float64) for values in (first, second))
    if first.ndim != 1 or first.shape != second.shape or len(first) < 2:
        raise ValueError(
            f"paired bootstrap: expected one value for each of the same two or more clips, found {first.shape} "
            f"and {second.shape}"
        )
    if not (np.isfinite(first).all() and np.isfinite(second).all()):
        raise ValueError("paired bootstrap: expected finite values, found NaN or infinity")
    differences = first - second
    groups = _groups(len(differences), videos)
    sums, counts = np.bincount(groups, differences), np.bincount(groups)
    n_videos = len(counts)
    if n_videos < 2:
        raise ValueError("paired bootstrap: expected clips of two or more videos, found one")
    rng = np.random.default_rng(seed)
    means = np.empty(n_resamples)
    for start in range(0, n_resamples, 1000):
        drawn = rng.integers(n_videos, size=(len(means[start : start + 1000]), n_videos))
        means[start : start + 1000] = sums[drawn].sum(1) / counts[drawn].sum(1)
    tail = min((means <= 0).sum(), (means >= 0).sum())
    return {
        "difference": float(differences.mean()),
        "ci95": np.percentile(means, [2.5, 97.5]).tolist(),
        "p_value": float(min(1, max(2 * (tail + 1) / (n_resamples + 1), 2.0 ** (1 - n_videos)))),
        "n_clips": len(differences),
        "n_videos": n_videos,
    }


def _groups(n_clips, videos):
    """(n_clips,) numbers 0, 1, ... of the videos."""
    if videos is None:
        return np.arange(n_clips)
    if len(videos) != n_clips:
        raise ValueError(f"videos: expected one for each of {n_clips} clips, found {len(videos)}")
    return np.unique(videos, return_inverse=True)[1]


def _mean_ci95(values, groups):
    """Over the first axis: (n,) -> float and [low, high]; (n, T) -> T of each. The interval is None for one video."""
    mean, n_groups = values.mean(0), groups.max() + 1
    if n_groups < 2:
        return mean.tolist(), None
    deviations = np.zeros((n_groups, *values.shape[1:]))
    np.add.at(deviations, groups, values - mean)
    error = np.sqrt(n_groups / (n_groups - 1) * np.square(deviations).sum(0)) / len(values)
    half = stdtrit(n_groups - 1, 0.975) * error
    return mean.tolist(), np.stack([mean - half, mean + half], -1).tolist()


def _all_ranks(state):
    """[state of rank 0, state of rank 1, ...]; just [state] in a process alone."""
    if not (dist.is_available() and dist.is_initialized()):
        return [state]
    states = [None] * dist.get_world_size()
    dist.all_gather_object(states, state)
    return states
