"""What is evaluated: which clips, how many futures at once, and what pipeline, data set and protocol allow."""

import math
import os
from collections.abc import Sequence
from functools import partial

import torch

import latentcast
from latentcast.config import is_whole
from latentcast.data.base import VideoDataset, match_conditions
from latentcast.metrics.frechet import MIN_EXTRAPOLATED
from latentcast.pipelines.video_prediction import VideoPredictionPipeline
from latentcast.priors.base import Prior
from latentcast.sizes import as_size, sides

from .protocol import UNDRAWN, Protocol

RECONSTRUCTION, DETERMINISTIC = "reconstruction", "deterministic"  # baselines that the pipeline gives


def choose_clips(dataset: VideoDataset, protocol: Protocol) -> list[int]:
    """Numbers of the clips that a protocol measures, spread over the split.

    Raises:
        ValueError: too few in the data set, or for a metric.
    """
    n_there, n_asked = len(dataset), protocol.n_clips or len(dataset)
    wanted = f"n_clips: expected {n_asked} clips of {protocol.n_frames} frames"
    _expect(protocol, n_asked <= n_there, f"{wanted}, the {protocol.split} split has {n_there}")
    fewest, fvd = (MIN_EXTRAPOLATED, "debiased fvd") if protocol.fvd_debiased else (2, "fvd")
    enough = n_asked >= fewest or "fvd" not in protocol.metrics
    _expect(protocol, enough, f"n_clips: expected at least {fewest} for {fvd}, found {n_asked}")
    return [i * n_there // n_asked for i in range(n_asked)]


def fitting_futures(device: torch.device | str, dataset: VideoDataset, protocol: Protocol) -> int:
    """How many futures to draw at once on a device: on a GPU 512, or half, a quarter ... of it (see Evaluation); on a
    CPU, which gains nothing from more, 64, or fewer where they could take an eighth of the machine's memory."""
    if torch.device(device).type == "cuda":
        return 512
    # Frames as floats, sixteen times: those of the samples, what their decoding holds, and what metrics make of them.
    bytes_each = 16 * 4 * protocol.n_frames * dataset.channels * math.prod(sides(protocol.frame_size))
    room = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 8
    futures = 64
    while futures > 1 and futures * bytes_each > room:
        futures //= 2
    return futures


def check_fit(pipe: VideoPredictionPipeline, dataset: VideoDataset, protocol: Protocol) -> None:
    """Refuse a pipeline, a data set and a protocol that do not belong together, naming both sides."""
    expect, prior, rate = partial(_expect, protocol), pipe.prior, protocol.fps_multiplier
    kind, spec = type(prior).__name__, prior.config.latent_spec
    model = (spec["frame_channels"], spec["frame_height"], spec["frame_width"])
    if model != dataset.frame_shape:
        raise ValueError(
            f"the pipeline predicts frames of (C, H, W) = {model}, the data set serves {dataset.frame_shape}"
        )
    match_conditions(prior.conditions, kind, dataset.conditions, "the data set")
    possible = rate == 1 or all(spec["per"] != "frame" for spec in prior.conditions.values())
    expect(possible, f"fps_multiplier: expected 1 for a prior that is told of each frame, found {rate}")
    size, served = protocol.frame_size, dataset.size
    expect(size == as_size(served), f"frame_size: expected {size}, the data set serves {served}")
    for metric in [name for name in ("lpips", "ilpips", "fvd") if name in protocol.metrics]:
        found = f"{metric} is of frames of 1 or 3 channels, the data set serves {dataset.channels}"
        expect(dataset.channels in (1, 3), f"metrics: {found}; leave it out")
    wanted, found = protocol.n_frames, dataset.clip_length
    expect(found == wanted, f"expected clips of {wanted} frames, found {found}")
    described = dataset.describe()
    if protocol.data is not None:
        name, stride = described.get("name"), described.get("frame_stride", 1)
        expect(name == protocol.data, f"data: expected {protocol.data}, found {name}")
        # its frames are those of the data set's own rate
        expect(stride == 1, f"data.frame_stride: expected 1, found {stride}")
    prepared = described.get("protocol") or {}
    wanted, found = protocol.data_protocol, prepared.get("protocol")
    expect(wanted in (None, found), f"data_protocol: expected {wanted}, found {found}")
    for name, wanted in protocol.data_options.items():
        found = prepared.get(name)
        expect(found == wanted, f"data_options: expected {name}={wanted}, found {found}")
    possible = has_likelihood(prior) or not {*protocol.metrics} <= {*UNDRAWN}
    expect(possible, f"bits: {kind} has no likelihood")
    possible = rate == 1 or "fps_multiplier" in prior.sampler_options()
    expect(possible, f"fps_multiplier {rate}: {kind} predicts whole frame steps")
    prior.check_context(protocol.n_context, protocol.n_context + protocol.n_predicted)


def _expect(protocol, holds, message):
    if not holds:
        raise ValueError(f"protocol {protocol.name}: {message}")


def has_likelihood(prior: Prior) -> bool:
    """Whether a prior's class has its own ``log_prob``."""
    return type(prior).log_prob is not latentcast.Prior.log_prob


def impossible(
    pipe: VideoPredictionPipeline, protocol: Protocol, baselines: Sequence[str]
) -> dict[tuple[str, str], str]:
    """What is asked for and cannot be had of a pipeline: ("metric" or "baseline", name) -> the reason."""
    prior, kind, found = pipe.prior, type(pipe.prior).__name__, {}
    if RECONSTRUCTION in baselines and pipe.tokenizer is None:
        found["baseline", RECONSTRUCTION] = "the pipeline has no tokenizer"
    if DETERMINISTIC in baselines and not callable(getattr(prior, "predict_mean", None)):
        found["baseline", DETERMINISTIC] = f"{kind} has no predict_mean"
    elif DETERMINISTIC in baselines and protocol.fps_multiplier > 1:
        found["baseline", DETERMINISTIC] = f"{kind}.predict_mean predicts whole frame steps"
    if "bits" in protocol.metrics and not has_likelihood(prior):
        found["metric", "bits"] = f"{kind} has no likelihood"
    return found


def check_crps_map(chosen: dict | None, clips: Sequence[int], protocol: Protocol) -> None:
    """Refuse an ``Evaluation.crps_map`` that is not of one of the clips and predicted frames."""
    if chosen is None:
        return
    if not isinstance(chosen, dict) or chosen.keys() != {"clip", "frame"}:
        raise ValueError(f"evaluation.crps_map: expected a clip and a frame, or null, found {chosen!r}")
    if "crps" not in protocol.metrics:
        raise ValueError(f"evaluation.crps_map: the protocol {protocol.name} does not measure crps")
    if chosen["clip"] not in clips:
        some = ", ".join(map(str, clips[:4]))
        raise ValueError(
            f"evaluation.crps_map.clip: expected one of the clips that are measured, {some}, ... {clips[-1]}, "
            f"found {chosen['clip']!r}"
        )
    if not is_whole(chosen["frame"], 1) or chosen["frame"] > protocol.n_predicted:
        raise ValueError(f"evaluation.crps_map.frame: expected 1 to {protocol.n_predicted}, found {chosen['frame']!r}")
