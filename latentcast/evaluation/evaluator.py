"""Roll a pipeline out over the clips of a protocol and measure what it predicts."""

import contextlib
import functools
import hashlib
import json
import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor
from torch.utils.data import default_collate

import latentcast
from latentcast.config import is_whole
from latentcast.data.base import VideoDataset
from latentcast.distributed import barrier, rank_and_world, rank_zero_first
from latentcast.metrics import FVD, BestOfN, bits_per_dim, mse
from latentcast.metrics.baselines import BASELINES
from latentcast.metrics.statistics import ClipValues
from latentcast.modeling import eval_mode, fingerprint
from latentcast.pipelines.video_prediction import VideoPredictionPipeline
from latentcast.priors.base import as_keyword
from latentcast.progress import Bar
from latentcast.shares import Share, turn

from .choice import DETERMINISTIC, RECONSTRUCTION, check_crps_map, check_fit, choose_clips, fitting_futures, impossible
from .parts import Parts
from .protocol import METRICS, UNDRAWN, Protocol, without_other_splits
from .scorer import Scorer

logger = logging.getLogger("latentcast")

MODEL, REAL, MAPS, SHOWN = "model", "real", "maps", "shown"  # beside baselines: whose, or which, tensors there are
TOLD = ("own", "shuffled", "none")


@dataclass
class Evaluation:
    """One pipeline under one protocol.

    Clips go through in groups. What is measured of a group is written to ``folder/parts`` before the next one starts:
    a killed evaluation goes on where it stopped, several processes share the groups, and no more than a group is ever
    in memory. ``finish`` joins the parts.

    Attributes:
        pipe: a VideoPredictionPipeline, on its device.
        dataset: a VideoDataset of the protocol's split whose clips have ``protocol.n_frames`` frames.
        protocol: a Protocol.
        folder: for parts and results.
        label: what to call the model.
        sampler: options of the prior's sampler.
        futures: drawn at once; None: see ``fitting_futures``. With the protocol's seed it sets which random numbers a
            clip gets. Where a GPU's memory does not do, half as many are drawn from then on, with the random numbers
            of an evaluation of that many, and the log says so.
        baselines: names out of ``latentcast.metrics.baselines``; "reconstruction", the tokenizer's own, of the whole
            clip: no prediction in its latents can beat it by much; and "deterministic", what the prior predicts without
            chance: ``prior.predict_mean(context, n_frames)`` -> (B, n_frames, ...) in the prior's space. One that the
            pipeline cannot give is left out, and the log says so.
        crps_map: {"clip": number in the data set, "frame": which of the predicted frames, from 1}: the maps of CRPS are
            of that frame, as RVD's Figure 4; None: means over clips and frames.
        conditions: what a prior with conditions is told of a clip: "own"; "shuffled": those of the next clip, which
            shows whether they matter; "none".
        weights: folder of the metric networks; None: see ``latentcast.metrics.weights``.
        references: folder in which what no model changes (features of the true videos, figures of copies) is kept for
            evaluations to come of the same clips under the same protocol, and read where it is there; None: measured
            every time.
    Raises:
        ValueError: pipeline, data and protocol do not belong together; names both sides.
    """

    pipe: VideoPredictionPipeline
    dataset: VideoDataset
    protocol: Protocol
    folder: Path
    label: str = "model"
    sampler: dict | None = None
    futures: int | None = None
    baselines: Sequence[str] = ("copy_last_frame", "mean_context", RECONSTRUCTION, DETERMINISTIC)
    crps_map: dict | None = None
    conditions: str = "own"
    weights: str | Path | None = None
    references: str | Path | None = None

    def __post_init__(self):
        if not isinstance(self.sampler, (dict, type(None))):
            raise ValueError(f"evaluation.sampler: expected options and their values, found {self.sampler!r}")
        if not isinstance(self.baselines, (list, tuple)):
            raise ValueError(f"evaluation.baselines: expected a list, found {self.baselines!r}")
        self.parts, self.sampler = Parts(Path(self.folder)), dict(self.sampler or {})
        known = (*BASELINES, RECONSTRUCTION, DETERMINISTIC)
        unknown = [name for name in self.baselines if name not in known]
        if unknown:
            raise ValueError(f"evaluation.baselines: expected some of {', '.join(known)}, found {unknown[0]!r}")
        if self.conditions not in TOLD:
            raise ValueError(f"evaluation.conditions: expected {', '.join(TOLD)}, found {self.conditions!r}")
        timed = [name for name in ("fps_multiplier", "frame_times") if name in self.sampler]
        if timed:
            raise ValueError(f"evaluation.sampler: {timed[0]}: the protocol sets it (protocol.fps_multiplier)")
        self.device = self.pipe.device
        if self.futures is None:
            self.futures = fitting_futures(self.device, self.dataset, self.protocol)
        if not is_whole(self.futures, 1):
            raise ValueError(f"evaluation.futures: expected a whole number of at least 1, found {self.futures!r}")
        check_fit(self.pipe, self.dataset, self.protocol)
        left_out = impossible(self.pipe, self.protocol, self.baselines)
        for what, reason in left_out.items():
            logger.info("the %s %s is left out: %s", *what, reason)
        self.baselines = [name for name in self.baselines if ("baseline", name) not in left_out]
        self.metrics = [name for name in self.protocol.metrics if ("metric", name) not in left_out]
        self.draws = not {*self.metrics} <= {*UNDRAWN}
        self.clips = choose_clips(self.dataset, self.protocol)
        self.video_of = {clip: self.dataset.video_of(clip) for clip in self.clips}
        check_crps_map(self.crps_map, self.clips, self.protocol)
        self._at_once = self.futures
        size = self._clips_at_once()
        self.groups = [self.clips[i : i + size] for i in range(0, len(self.clips), size)]
        self.scorer = Scorer(self.protocol, self.weights, self.device)
        self.lpips = self.scorer.lpips

    @functools.cached_property
    def identity(self) -> dict:
        """JSON-able: two evaluations with equal identities give equal results."""
        data = without_other_splits(self.dataset.describe(), self.protocol.split)
        digest = hashlib.sha256(json.dumps([data, self.clips], sort_keys=True).encode()).hexdigest()
        models, scheduler = {"prior": self.pipe.prior, "tokenizer": self.pipe.tokenizer}, self.pipe.scheduler
        identity = {
            "protocol": {"name": self.protocol.name, "source": self.protocol.source} | self.protocol.describe(),
            "data": {
                "name": data.get("name", data["type"]),
                "protocol": data.get("protocol"),
                "split": self.protocol.split,
                "n_clips": len(self.clips),
                "sha256": digest,
                "describe": data,
            },
            "detector": self.scorer.fingerprints,
            "model": {
                "name": self.label,
                **{name: None if model is None else type(model).__name__ for name, model in models.items()},
                **{f"{name}_fingerprint": model and fingerprint(model) for name, model in models.items()},
                "parameters": {name: model.num_parameters() for name, model in models.items() if model is not None},
                "dtype": str(self.pipe.prior.dtype).removeprefix("torch."),
                "sampler": self.sampler,
                **({} if scheduler is None else {"scheduler": {"class": type(scheduler).__name__, **scheduler.config}}),
            },
            "settings": {"futures": self.futures, "baselines": self.baselines, "crps_map": self.crps_map}
            | ({} if self.conditions == "own" else {"conditions": self.conditions}),
            "seed": self.protocol.seed,
            "version": latentcast.__version__,
        }
        return json.loads(json.dumps(identity))

    @functools.cached_property
    def _kept(self) -> dict[str, Parts]:
        """Whose figures and features no model changes -> where those of these clips are kept."""
        if self.references is None or not self.draws:
            return {}
        whos = [*(name for name in self.baselines if name in BASELINES), *([REAL] if self.scorer.fvd else [])]
        measured = {key: self.identity[key] for key in ("data", "detector", "version")}
        measured["protocol"] = self.protocol.describe()
        measured["protocol"]["metrics"] = sorted({*self.metrics} - {*UNDRAWN, "ilpips"})
        measured |= {"groups": self.groups, "crps_map": self.crps_map}
        digest = hashlib.sha256(json.dumps(measured, sort_keys=True).encode()).hexdigest()
        return {who: Parts(Path(self.references).expanduser() / digest[:16] / who) for who in whos}

    def run(self, share: Share | None = None) -> int:
        """Measure every group that is not measured yet, or a ``latentcast.shares.Share`` of them; -> the number of
        clips that this process did."""
        rank, world_size = rank_and_world()
        identity = self.identity
        with rank_zero_first():
            if rank == 0:
                with contextlib.nullcontext() if share is None else turn(self.folder.parent, "evaluation"):
                    self.parts.prepare(identity, shared=share is not None)
        groups = (share or Share(rank, world_size)).of(self.pending())
        n_clips = sum(len(self.groups[g]) for g in groups)
        self.pipe.set_progress_bar_config(disable=True)
        with Bar(total=n_clips, desc=f"evaluate {self.protocol.name}", unit="clip", disable=rank > 0) as bar:
            for group in groups:
                began = time.perf_counter()
                found = self.measure(group)
                self.parts.write(group, found, time.perf_counter() - began)
                bar.update(len(self.groups[group]))
        barrier()
        return n_clips

    def pending(self) -> list[int]:
        """Groups that nobody has measured yet."""
        return [group for group in range(len(self.groups)) if not self.parts.path(group).is_file()]

    def measure(self, group: int) -> dict[tuple[str, str], Tensor]:
        """What is known of a group of clips: (who, metric), ("maps", who) and ("shown", name) -> tensor."""
        known = {}
        for who, kept in self._kept.items():
            if kept.path(group).is_file():
                known |= kept.read(group, who, MAPS)
        whos = {who for who, _ in known}
        while True:
            try:
                parts = [self._measure(*piece, whos) for piece in self._pieces(group)]
                break
            except torch.OutOfMemoryError:
                if self._at_once == 1:
                    raise
            # Out here nothing holds on to the tensors of what failed.
            torch.cuda.empty_cache()
            self._at_once //= 2
            logger.warning(
                "out of memory: going on with %d futures at once, as evaluation.futures=%d would", *[self._at_once] * 2
            )
        found = {
            key: (_sum if key[0] == MAPS else torch.cat)([part[key] for part in parts if key in part])
            for key in dict.fromkeys(key for part in parts for key in part)
        }
        for who, kept in self._kept.items():
            if who not in whos:
                kept.write(group, {key: tensor for key, tensor in found.items() if who in key})
        return found | known

    def _clips_at_once(self):
        return max(1, self._at_once // self.protocol.n_samples)

    def _pieces(self, group):
        """The group's clips, as many together as there is room for, with what sets their random numbers: the number of
        their group where groups are so small."""
        clips, whole, size = self.groups[group], len(self.groups[0]), self._clips_at_once()
        for start in range(0, len(clips), size):
            own = (group * whole + start) // size if whole % size == 0 else f"{group}.{start}"
            yield clips[start : start + size], own if size < whole else group

    @torch.no_grad()
    def _measure(self, numbers, random, known):
        """``known``: whose figures there are already."""
        items = default_collate([self.dataset[i] for i in numbers])
        clips, found = items["frames"].to(self.device), {}
        told = self._told(numbers, items)
        with eval_mode(self.pipe.prior, self.pipe.tokenizer):
            if self.draws:
                found |= self._measure_futures(numbers, random, clips, told, known)
            if "clip_mse" in self.metrics and RECONSTRUCTION in self.baselines:
                both = self._baseline(RECONSTRUCTION, clips, told), self.protocol.divide(clips)
                found[RECONSTRUCTION, "clip_mse"] = mse(*(self.scorer.seen(torch.cat(parts, 1)) for parts in both))
            if "bits" in self.metrics:
                codes = self.pipe.encode(clips)
                log_prob = self.pipe.prior.log_prob(codes, self.protocol.n_context, **as_keyword(told))
                found[MODEL, "bits"] = bits_per_dim(log_prob, codes[0, self.protocol.n_context :].shape)
        return {key: tensor.cpu().contiguous() for key, tensor in found.items()}

    def _told(self, numbers, items):
        """Conditions for the prior of clips, whose collated items are given, or None."""
        names = self.pipe.prior.conditions
        if not names or self.conditions == "none":
            return None
        if self.conditions == "shuffled":
            following = [self.clips[(self.clips.index(i) + 1) % len(self.clips)] for i in numbers]
            items = default_collate([self.dataset[i] for i in following])
        return {name: items["conditions"][name] for name in names}

    def _measure_futures(self, numbers, random, clips, told, known):
        protocol = self.protocol
        context, target = protocol.divide(clips)
        samples = self._draw(context, random, told)
        if not samples.isfinite().all():
            raise ValueError(f"{self.label}: NaN or infinity among the frames predicted for clips {numbers}")
        seen = self.scorer.seen
        samples, target = seen(samples), seen(target)
        truth = self.scorer.truth(target)
        found = self._scores(numbers, MODEL, samples, seen(context), truth)
        for name in self.baselines:
            if name in known:
                continue
            given, future = self._baseline(name, clips, told)
            still = future.stride(1) == 0  # one picture, as often as there are frames
            future = seen(future[:, :1]).expand_as(future) if still else seen(future)
            found |= self._scores(numbers, name, future[:, None], seen(given), truth)
        if self.scorer.fvd is not None and REAL not in known:
            found[REAL, "fvd"] = self.scorer.video_features(seen(context), target)
        best = found[MODEL, "mse"].mean(-1).argmin(1)
        for name, shown in (("best", samples[torch.arange(len(samples)), best]), ("random", samples[:, 0])):
            found[SHOWN, name] = ((shown + 1) * 127.5).round().to(torch.uint8)
        return found

    def _draw(self, context, random, told=None):
        """Futures of contexts (B, T, C, H, W), with what the prior is told of the clips -> (B, S, T, C, H, W), as many
        at once as there is room for."""
        n_samples, n_predicted, drawn = self.protocol.n_samples, self.protocol.n_predicted, []
        sampler = dict(self.sampler)
        if self.protocol.fps_multiplier > 1:
            sampler["fps_multiplier"] = self.protocol.fps_multiplier
        generator = torch.Generator().manual_seed(_seed(self.protocol.seed, random))
        while sum(part.shape[1] for part in drawn) < n_samples:
            n = min(self._at_once, n_samples - sum(part.shape[1] for part in drawn))
            settings = {"num_samples": n, "generator": generator, "conditions": told, "value_range": (-1, 1)}
            futures = self.pipe(context, n_predicted, **settings, **sampler)
            drawn.append(futures.frames.to(self.device))
        return torch.cat(drawn, 1)

    def _baseline(self, name, clips, told):
        """Context and future (B, T, C, H, W) of a baseline; the context is the true one but for the reconstruction."""
        if name == RECONSTRUCTION:
            latents = self.pipe.tokenizer.encode(clips).latents
            return self.protocol.divide(self.pipe.tokenizer.decode(latents).float().clamp(-1, 1))
        context, n_predicted = self.protocol.divide(clips)[0], self.protocol.n_predicted
        if name == DETERMINISTIC:
            mean = self.pipe.prior.predict_mean(self.pipe.encode(context), n_predicted, **as_keyword(told))
            return context, self.pipe.decode(mean[:, None])[:, 0]
        return context, BASELINES[name](context, n_predicted)

    def _scores(self, clips, who, samples, context, truth):
        scores = self.scorer.score(samples, context, truth, pairs=who == MODEL)
        found = {(who, name): values for name, values in scores.items()}
        if "crps" in scores:
            maps, chosen = scores["crps"], self.crps_map
            found[who, "crps"] = maps.mean((-3, -2, -1))
            if chosen is None:
                found[MAPS, who] = maps.mean((1, 2)).double().sum(0) / len(self.clips)
            elif chosen["clip"] in clips:
                found[MAPS, who] = maps[clips.index(chosen["clip"]), chosen["frame"] - 1].mean(0).double()
        return found

    def finish(self) -> dict | None:
        """Join the parts -> dict of ``identity``, ``metrics`` and ``baselines`` with values; on rank 0 alone."""
        values = {}
        for group, clips in enumerate(self.groups):
            # not what is shown and the maps, which, of all groups, would fill the memory
            for (who, metric), tensor in self.parts.read(group, MODEL, REAL, *self.baselines).items():
                # a copy: the tensor itself keeps its whole file in memory
                values.setdefault(who, {}).setdefault(metric, []).append((clips, tensor.clone()))
        real = values.pop(REAL, {}).get("fvd")
        summaries = {who: self._summarise(found, real) for who, found in values.items()}
        return self.identity | {"metrics": summaries.pop(MODEL), "baselines": summaries}

    def _summarise(self, found, real):
        """metric -> plain numbers of one predictor."""
        summary = {}
        if self.draws:
            n_samples, metrics = found["mse"][0][1].shape[1], self.scorer.frame_metrics
            best_of_n = BestOfN(metrics, [n for n in self.protocol.best_of if n <= n_samples])
            for parts in zip(*(found[name] for name in metrics)):
                best_of_n.add({name: scores for name, (_, scores) in zip(metrics, parts)}, parts[0][0])
            summary |= best_of_n.compute(self.video_of)
        for name in ("clip_mse", "crps", "ilpips", "bits"):
            if name in found:
                values = ClipValues()
                for clips, rows in found[name]:
                    values.update(rows, clips)
                summary[name] = values.compute(self.video_of)
        if real is not None:
            fvd = FVD(self.scorer.fvd.detector)
            for (clips, rows), (_, truth) in zip(found["fvd"], real):
                fvd.add(real=truth, fake=rows, clips=clips)
            counts = fvd.n_videos
            summary["fvd"] = {
                "mean": fvd.compute(),
                "ci95": None,
                "n_real": counts["real"],
                "n_fake": counts["fake"],
                "debiased": fvd.compute(extrapolate=True) if self.protocol.fvd_debiased else None,
            }
        return {name: summary[name] for name in METRICS if name in summary and name in self.metrics}

    def crps_maps(self) -> dict[str, Float[Tensor, "H W"]]:
        """Mean CRPS over clips, frames and channels, or of ``crps_map``, by whose; {} if crps is not measured."""
        maps = {}
        for group in range(len(self.groups)):
            for (_, who), tensor in self.parts.read(group, MAPS).items():
                maps[who] = maps.get(who, 0) + tensor
        return maps

    def clip_errors(self) -> dict[int, float]:
        """clip -> mean squared error of its best sample"""
        errors = {}
        for group, clips in enumerate(self.groups):
            scores = self.parts.read(group, MODEL)[MODEL, "mse"]
            errors |= dict(zip(clips, scores.mean(-1).amin(1).tolist()))
        return errors

    def shown(
        self, clip: int
    ) -> tuple[Float[Tensor, "T C H W"], Float[Tensor, "F C H W"], dict[str, Float[Tensor, "F C H W"]]]:
        """Of one of ``clips``: context and future, and the shown samples' futures by name."""
        group = next(g for g, clips in enumerate(self.groups) if clip in clips)
        place, part = self.groups[group].index(clip), self.parts.read(group, SHOWN)
        context, future = self.protocol.divide(self.dataset[clip]["frames"])
        samples = {name: tensor[place].float() / 127.5 - 1 for (_, name), tensor in part.items()}
        return context, future, samples


def _seed(seed, random):
    return int.from_bytes(hashlib.sha256(f"{seed} {random}".encode()).digest()[:8], "big") >> 1


def _sum(tensors):
    return functools.reduce(torch.add, tensors)
