"""Roll a pipeline out over the clips of a protocol and measure what it predicts."""

import collections
import contextlib
import functools
import hashlib
import json
import logging
import math
import os
import platform
import shutil
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch.utils.data import default_collate

import latentcast
from latentcast.command import IN_CHECKOUT
from latentcast.config import is_whole
from latentcast.data.base import match_conditions
from latentcast.data.store.shards import difference_of
from latentcast.distributed import barrier, rank_and_world, rank_zero_first
from latentcast.files import read_json, replacing, write_json
from latentcast.metrics import FVD, I3D, LPIPS, BestOfN, bits_per_dim, crps, mse, psnr, ssim
from latentcast.metrics.baselines import BASELINES
from latentcast.metrics.ensemble import mean_of_pairs
from latentcast.metrics.frame import round_to_levels
from latentcast.metrics.frechet import MIN_EXTRAPOLATED
from latentcast.metrics.statistics import ClipValues
from latentcast.metrics.weights import find_weights
from latentcast.modeling import eval_mode, fingerprint
from latentcast.priors.base import as_keyword
from latentcast.progress import Bar
from latentcast.sizes import as_size, sides

from .protocol import BEST_OF, METRICS, UNDRAWN, Protocol, without_other_splits

logger = logging.getLogger("latentcast")

MODEL, RECONSTRUCTION, DETERMINISTIC = "model", "reconstruction", "deterministic"
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
    Raises:
        ValueError: pipeline, data and protocol do not belong together; names both sides.
    """

    pipe: object
    dataset: object
    protocol: Protocol
    folder: Path
    label: str = "model"
    sampler: dict | None = None
    futures: int | None = None
    baselines: tuple = ("copy_last_frame", "mean_context", RECONSTRUCTION, DETERMINISTIC)
    crps_map: dict | None = None
    conditions: str = "own"
    weights: str | None = None

    def __post_init__(self):
        if not isinstance(self.sampler, (dict, type(None))):
            raise ValueError(f"evaluation.sampler: expected options and their values, found {self.sampler!r}")
        if not isinstance(self.baselines, (list, tuple)):
            raise ValueError(f"evaluation.baselines: expected a list, found {self.baselines!r}")
        self.folder, self.sampler = Path(self.folder), dict(self.sampler or {})
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
        impossible = self._impossible()
        for what, reason in impossible.items():
            logger.info("%s is left out: %s", what, reason)
        self.baselines = [name for name in self.baselines if f"the baseline {name}" not in impossible]
        self.metrics = [name for name in self.protocol.metrics if f"the metric {name}" not in impossible]
        self.draws = not {*self.metrics} <= {*UNDRAWN}
        n_there, n_asked = len(self.dataset), self.protocol.n_clips or len(self.dataset)
        if n_asked > n_there:
            raise ValueError(
                f"protocol {self.protocol.name}: n_clips: expected {n_asked} clips of {self.protocol.n_frames} frames, "
                f"the {self.protocol.split} split has {n_there}"
            )
        self.clips = [i * n_there // n_asked for i in range(n_asked)]  # spread over the split
        self.video_of = {clip: self.dataset.video_of(clip) for clip in self.clips}
        self._check_crps_map()
        self._at_once = self.futures
        size = self._clips_at_once()
        self.groups = [self.clips[i : i + size] for i in range(0, n_asked, size)]
        self.lpips = self.fvd = None
        if "lpips" in self.protocol.metrics or "ilpips" in self.protocol.metrics:
            self.lpips = LPIPS(self.protocol.lpips, self.weights).to(self.device)
        if "fvd" in self.protocol.metrics:
            fewest = MIN_EXTRAPOLATED if self.protocol.fvd_debiased else 2
            if n_asked < fewest:
                raise ValueError(
                    f"protocol {self.protocol.name}: n_clips: expected at least {fewest} for "
                    f"{'debiased ' * self.protocol.fvd_debiased}fvd, found {n_asked}"
                )
            self.fvd = FVD(I3D(find_weights(self.protocol.detector, self.weights))).to(self.device)
        # mse is always measured: it chooses the clips that are shown
        frame_metrics = {"mse": mse, "psnr": self._psnr, "ssim": self._ssim, "lpips": self.lpips}
        names = {"mse", *self.protocol.metrics} & set(BEST_OF)
        self.frame_metrics = {name: frame_metrics[name] for name in BEST_OF if name in names}

    @functools.cached_property
    def identity(self):
        """JSON-able: two evaluations with equal identities give equal results."""
        data = without_other_splits(self.dataset.describe(), self.protocol.split)
        digest = hashlib.sha256(json.dumps([data, self.clips], sort_keys=True).encode()).hexdigest()
        prior, tokenizer = self.pipe.prior, self.pipe.tokenizer
        models = {"prior": prior, "tokenizer": tokenizer}
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
            "detector": {
                name: None if network is None else network.fingerprint
                for name, network in (("fvd", self.fvd), ("lpips", self.lpips))
            },
            "model": {
                "name": self.label,
                **{name: None if model is None else type(model).__name__ for name, model in models.items()},
                **{f"{name}_fingerprint": model and fingerprint(model) for name, model in models.items()},
                "parameters": {name: _n_parameters(model) for name, model in models.items() if model is not None},
                "dtype": str(prior.dtype).removeprefix("torch."),
                "sampler": self.sampler,
                **_scheduler(self.pipe.scheduler),
            },
            "settings": {"futures": self.futures, "baselines": self.baselines, "crps_map": self.crps_map}
            | ({} if self.conditions == "own" else {"conditions": self.conditions}),
            "seed": self.protocol.seed,
            "version": latentcast.__version__,
        }
        return json.loads(json.dumps(identity))

    def run(self):
        """Measure every group that is not measured yet; -> the number of clips that this process did."""
        rank, world_size = rank_and_world()
        identity = self.identity
        with rank_zero_first():
            if rank == 0:
                self._prepare(identity)
        groups = [g for g in range(rank, len(self.groups), world_size) if not self._part(g).is_file()]
        n_clips = sum(len(self.groups[g]) for g in groups)
        self.pipe.set_progress_bar_config(disable=True)
        with Bar(total=n_clips, desc=f"evaluate {self.protocol.name}", unit="clip", disable=rank > 0) as bar:
            for group in groups:
                began = time.perf_counter()
                found = self.measure(group)
                seconds = str(time.perf_counter() - began)
                with replacing(self._part(group)) as temporary:
                    save_file(found, temporary, metadata={"seconds": seconds})
                bar.update(len(self.groups[group]))
        barrier()
        return n_clips

    def measure(self, group):
        """name -> tensor of what is known of a group of clips; the keys are WHO.METRIC, maps.WHO and shown.NAME."""
        while True:
            try:
                parts = [self._measure(*piece) for piece in self._pieces(group)]
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
        return {
            key: sum(part[key] for part in parts if key in part)
            if key.startswith("maps.")
            else torch.cat([part[key] for part in parts])
            for key in dict.fromkeys(key for part in parts for key in part)
        }

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
    def _measure(self, numbers, random):
        items = default_collate([self.dataset[i] for i in numbers])
        clips, found = items["frames"].to(self.device), {}
        told = self._told(numbers, items)
        with eval_mode(self.pipe.prior, self.pipe.tokenizer):
            if self.draws:
                found |= self._measure_futures(numbers, random, clips, told)
            if "clip_mse" in self.metrics and RECONSTRUCTION in self.baselines:
                both = self._baseline(RECONSTRUCTION, clips, told), self.protocol.divide(clips)
                found[f"{RECONSTRUCTION}.clip_mse"] = mse(*(self._seen(torch.cat(parts, 1)) for parts in both))
            if "bits" in self.metrics:
                codes = self.pipe.encode(clips)
                log_prob = self.pipe.prior.log_prob(codes, self.protocol.n_context, **as_keyword(told))
                found[f"{MODEL}.bits"] = bits_per_dim(log_prob, codes[0, self.protocol.n_context :].shape)
        return {name: tensor.cpu().contiguous() for name, tensor in found.items()}

    def _told(self, numbers, items):
        """Conditions for the prior of clips, whose collated items are given, or None."""
        names = self.pipe.prior.conditions
        if not names or self.conditions == "none":
            return None
        if self.conditions == "shuffled":
            following = [self.clips[(self.clips.index(i) + 1) % len(self.clips)] for i in numbers]
            items = default_collate([self.dataset[i] for i in following])
        return {name: items["conditions"][name] for name in names}

    def _measure_futures(self, numbers, random, clips, told):
        protocol = self.protocol
        context, target = protocol.divide(clips)
        samples = self._draw(context, random, told)
        if not samples.isfinite().all():
            raise ValueError(f"{self.label}: NaN or infinity among the frames predicted for clips {numbers}")
        samples, target = self._seen(samples), self._seen(target)
        truth = self.lpips.features(target) if "lpips" in self.frame_metrics else None
        found = self._scores(numbers, MODEL, samples, self._seen(context), target, truth)
        for name in self.baselines:
            given, future = self._baseline(name, clips, told)
            still = future.stride(1) == 0  # one picture, as often as there are frames
            future = self._seen(future[:, :1]).expand_as(future) if still else self._seen(future)
            found |= self._scores(numbers, name, future[:, None], self._seen(given), target, truth)
        if self.fvd is not None:
            found["real.fvd"] = self.fvd.features(self._with_context(self._seen(context), target))
        best = found[f"{MODEL}.mse"].mean(-1).argmin(1)
        for name, shown in (("best", samples[torch.arange(len(samples)), best]), ("random", samples[:, 0])):
            found[f"shown.{name}"] = ((shown + 1) * 127.5).round().to(torch.uint8)
        return found

    def _seen(self, frames):
        """Frames as the metrics see them."""
        return round_to_levels(frames) if self.protocol.rounded else frames

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

    def _impossible(self):
        """What is asked for and cannot be had of this pipeline -> the reason."""
        prior, protocol, found = self.pipe.prior, self.protocol, {}
        kind = type(prior).__name__
        if RECONSTRUCTION in self.baselines and self.pipe.tokenizer is None:
            found[f"the baseline {RECONSTRUCTION}"] = "the pipeline has no tokenizer"
        if DETERMINISTIC in self.baselines and not callable(getattr(prior, "predict_mean", None)):
            found[f"the baseline {DETERMINISTIC}"] = f"{kind} has no predict_mean"
        elif DETERMINISTIC in self.baselines and protocol.fps_multiplier > 1:
            found[f"the baseline {DETERMINISTIC}"] = f"{kind}.predict_mean predicts whole frame steps"
        if "bits" in protocol.metrics and not has_likelihood(prior):
            found["the metric bits"] = f"{kind} has no likelihood"
        return found

    def _check_crps_map(self):
        chosen = self.crps_map
        if chosen is None:
            return
        if not isinstance(chosen, dict) or chosen.keys() != {"clip", "frame"}:
            raise ValueError(f"evaluation.crps_map: expected a clip and a frame, or null, found {chosen!r}")
        if "crps" not in self.metrics:
            raise ValueError(f"evaluation.crps_map: the protocol {self.protocol.name} does not measure crps")
        if chosen["clip"] not in self.clips:
            some = ", ".join(map(str, self.clips[:4]))
            raise ValueError(
                f"evaluation.crps_map.clip: expected one of the clips that are measured, {some}, ... {self.clips[-1]}, "
                f"found {chosen['clip']!r}"
            )
        last = self.protocol.n_predicted
        if not is_whole(chosen["frame"], 1) or chosen["frame"] > last:
            raise ValueError(f"evaluation.crps_map.frame: expected 1 to {last}, found {chosen['frame']!r}")

    def _scores(self, clips, who, samples, context, target, truth):
        best_of_n = BestOfN({name: metric for name, metric in self.frame_metrics.items() if name != "lpips"})
        found = {f"{who}.{name}": scores for name, scores in best_of_n.score(samples, target).items()}
        found |= {f"{who}.{name}": scores for name, scores in self._perceptual(who, samples, truth).items()}
        if "crps" in self.protocol.metrics:
            # a single prediction has no pairs; both estimators are its absolute error
            estimator = self.protocol.crps if samples.shape[1] > 1 else "standard"
            maps = crps(samples, target, estimator, reduction="none")
            found[f"{who}.crps"] = maps.mean((-3, -2, -1))
            chosen = self.crps_map
            if chosen is None:
                found[f"maps.{who}"] = maps.mean((1, 2)).double().sum(0) / len(self.clips)
            elif chosen["clip"] in clips:
                one = maps[clips.index(chosen["clip"]), chosen["frame"] - 1]
                found[f"maps.{who}"] = one.mean(0).double()
        if self.fvd is not None:
            shown = samples[:, : self.protocol.fvd_samples]
            contexts = context[:, None].expand(-1, shown.shape[1], -1, -1, -1, -1)
            found[f"{who}.fvd"] = self.fvd.features(self._with_context(contexts, shown))
        return found

    def _perceptual(self, who, samples, truth):
        """``lpips`` (B, S, T), and of the model ``ilpips`` (B, T), as far as they are asked for; each picture passes
        the network once. ``truth``: features of the true frames."""
        scores = []

        def features():
            for sample in samples.unbind(1):
                found = self.lpips.features(sample[:, :1] if sample.stride(1) == 0 else sample)
                if truth is not None:
                    scores.append(self.lpips.distance(found, truth))
                yield found

        found = {}
        if who == MODEL and "ilpips" in self.protocol.metrics:
            found["ilpips"] = mean_of_pairs(features(), self.lpips.distance, self.protocol.ilpips)
        elif truth is not None:
            collections.deque(features(), maxlen=0)
        return found | ({"lpips": torch.stack(scores, 1)} if truth is not None else {})

    def _with_context(self, context, future):
        return torch.cat([context, future], -4) if self.protocol.fvd_context else future

    def _psnr(self, prediction, target):
        return psnr(prediction, target, of=self.protocol.psnr)

    def _ssim(self, prediction, target):
        return ssim(prediction, target, window=self.protocol.ssim)

    def finish(self):
        """Join the parts -> dict of ``identity``, ``metrics`` and ``baselines`` with values; on rank 0 alone."""
        values = {}
        for group, clips in enumerate(self.groups):
            part = self._read(group)
            for key, tensor in part.items():
                who, _, metric = key.partition(".")
                if who not in ("shown", "maps"):  # frames and maps, of all groups, would fill the memory
                    # a copy: the tensor itself keeps its whole file in memory
                    values.setdefault(who, {}).setdefault(metric, []).append((clips, tensor.clone()))
        real = values.pop("real", {}).get("fvd")
        summaries = {who: self._summarise(found, real) for who, found in values.items()}
        return self.identity | {"metrics": summaries.pop(MODEL), "baselines": summaries}

    def _summarise(self, found, real):
        """metric -> plain numbers of one predictor."""
        summary = {}
        if self.draws:
            n_samples = found["mse"][0][1].shape[1]
            counts = [n for n in self.protocol.best_of if n <= n_samples]
            best_of_n = BestOfN(self.frame_metrics, counts)
            for parts in zip(*(found[name] for name in self.frame_metrics)):
                best_of_n.add({name: scores for name, (_, scores) in zip(self.frame_metrics, parts)}, parts[0][0])
            summary |= best_of_n.compute(self.video_of)
        for name in ("clip_mse", "crps", "ilpips", "bits"):
            if name in found:
                values = ClipValues()
                for clips, rows in found[name]:
                    values.update(rows, clips)
                summary[name] = values.compute(self.video_of)
        if real is not None:
            fvd = FVD(self.fvd.detector)
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

    def seconds(self):
        """What measuring all groups took, by whichever processes and in however many runs."""
        total = 0.0
        for group in range(len(self.groups)):
            with safe_open(self._part(group), framework="pt") as file:
                total += float(file.metadata()["seconds"])
        return total

    def crps_maps(self):
        """who -> (H, W) mean CRPS over clips, frames and channels, or of ``crps_map``; {} if crps is not measured."""
        maps = {}
        for group in range(len(self.groups)):
            for key, tensor in self._read(group, "maps.").items():
                who = key.partition(".")[2]
                maps[who] = maps.get(who, 0) + tensor
        return maps

    def clip_errors(self):
        """clip -> mean squared error of its best sample"""
        errors = {}
        for group, clips in enumerate(self.groups):
            scores = self._read(group, f"{MODEL}.mse")[f"{MODEL}.mse"]
            errors |= dict(zip(clips, scores.mean(-1).amin(1).tolist()))
        return errors

    def shown(self, clip):
        """Of one of ``clips``: context and future (T, C, H, W), and the name -> future of shown samples."""
        group = next(g for g, clips in enumerate(self.groups) if clip in clips)
        place, part = self.groups[group].index(clip), self._read(group, "shown.")
        context, future = self.protocol.divide(self.dataset[clip]["frames"])
        samples = {key.partition(".")[2]: tensor[place].float() / 127.5 - 1 for key, tensor in part.items()}
        return context, future, samples

    def clear(self):
        """Delete the parts, and the folder if nothing else is in it."""
        shutil.rmtree(self.folder / "parts", ignore_errors=True)
        with contextlib.suppress(OSError):
            self.folder.rmdir()

    def _part(self, group):
        return self.folder / "parts" / f"group-{group:05d}.safetensors"

    def _read(self, group, prefix=""):
        path = self._part(group)
        try:
            with safe_open(path, framework="pt") as file:
                return {key: file.get_tensor(key) for key in file.keys() if key.startswith(prefix)}
        except (OSError, SafetensorError) as error:
            raise OSError(f"{path}: cannot be read ({error}); delete it and evaluate again, the rest is kept") from None

    def _prepare(self, identity):
        """Keep parts of this very evaluation, clear those of another."""
        plan = self.folder / "parts" / "plan.json"
        if plan.is_file():
            difference = difference_of(read_json(plan), identity)
            if not difference:
                return
            logger.info("%s: parts of another evaluation are cleared (%s)", self.folder, difference)
        self.clear()
        plan.parent.mkdir(parents=True)
        write_json(plan, identity)


def fitting_futures(device, dataset, protocol):
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


def check_fit(pipe, dataset, protocol):
    """Refuse a pipeline, a data set and a protocol that do not belong together, naming both sides."""
    spec = pipe.prior.config.latent_spec
    model = (spec["frame_channels"], spec["frame_height"], spec["frame_width"])
    if model != dataset.frame_shape:
        raise ValueError(
            f"the pipeline predicts frames of (C, H, W) = {model}, the data set serves {dataset.frame_shape}"
        )
    match_conditions(pipe.prior.conditions, type(pipe.prior).__name__, dataset.conditions, "the data set")
    if protocol.fps_multiplier > 1 and any(spec["per"] == "frame" for spec in pipe.prior.conditions.values()):
        raise ValueError(
            f"protocol {protocol.name}: fps_multiplier: expected 1 for a prior that is told of each frame, found "
            f"{protocol.fps_multiplier}"
        )
    if protocol.frame_size != as_size(dataset.size):
        raise ValueError(
            f"protocol {protocol.name}: frame_size: expected {protocol.frame_size}, the data set serves {dataset.size}"
        )
    networks = [metric for metric in ("lpips", "ilpips", "fvd") if metric in protocol.metrics]
    if networks and dataset.channels not in (1, 3):
        raise ValueError(
            f"protocol {protocol.name}: metrics: {networks[0]} is of frames of 1 or 3 channels, the data set serves "
            f"{dataset.channels}; leave it out"
        )
    if dataset.clip_length != protocol.n_frames:
        raise ValueError(
            f"protocol {protocol.name}: expected clips of {protocol.n_frames} frames, found {dataset.clip_length}"
        )
    found = dataset.describe()
    if protocol.data is not None and found.get("name") != protocol.data:
        raise ValueError(f"protocol {protocol.name}: data: expected {protocol.data}, found {found.get('name')}")
    stride = found.get("frame_stride", 1)
    if protocol.data is not None and stride != 1:  # its frames are those of the data set's own rate
        raise ValueError(f"protocol {protocol.name}: data.frame_stride: expected 1, found {stride}")
    prepared = found.get("protocol") or {}
    kind = prepared.get("protocol")
    if protocol.data_protocol is not None and kind != protocol.data_protocol:
        raise ValueError(f"protocol {protocol.name}: data_protocol: expected {protocol.data_protocol}, found {kind}")
    for name, value in protocol.data_options.items():
        if prepared.get(name) != value:
            raise ValueError(
                f"protocol {protocol.name}: data_options: expected {name}={value}, found {prepared.get(name)}"
            )
    if {*protocol.metrics} <= {*UNDRAWN} and not has_likelihood(pipe.prior):
        raise ValueError(f"protocol {protocol.name}: bits: {type(pipe.prior).__name__} has no likelihood")
    if protocol.fps_multiplier > 1 and "fps_multiplier" not in pipe.prior.sampler_options():
        raise ValueError(
            f"protocol {protocol.name}: fps_multiplier {protocol.fps_multiplier}: {type(pipe.prior).__name__} predicts "
            "whole frame steps"
        )
    pipe.prior.check_context(protocol.n_context, protocol.n_context + protocol.n_predicted)


def has_likelihood(prior):
    """Whether a prior's class has its own ``log_prob``."""
    return type(prior).log_prob is not latentcast.Prior.log_prob


def _scheduler(scheduler):
    """What of a pipeline's noise scheduler changes the figures; nothing where there is none."""
    return {} if scheduler is None else {"scheduler": {"class": type(scheduler).__name__, **scheduler.config}}


def hardware(device):
    """What an evaluation ran on."""
    name = torch.cuda.get_device_name(device) if torch.device(device).type == "cuda" else platform.machine()
    return {"device": name, "threads": torch.get_num_threads(), "torch": torch.__version__}


def git_commit():
    """The commit that this code is at, with "+" if files were changed; None where it is no checkout (what an
    environment lies in may be a repository of another project)."""
    if not IN_CHECKOUT:
        return None
    git = ["git", "-C", str(Path(latentcast.__file__).parents[1])]
    try:
        commit = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout.strip()
        changed = subprocess.run([*git, "diff", "--quiet", "HEAD"], capture_output=True).returncode
    except (OSError, subprocess.CalledProcessError):
        return None
    return commit + "+" * bool(changed)


def _seed(seed, random):
    return int.from_bytes(hashlib.sha256(f"{seed} {random}".encode()).digest()[:8], "big") >> 1


def _n_parameters(model):
    return sum(parameter.numel() for parameter in model.parameters())
