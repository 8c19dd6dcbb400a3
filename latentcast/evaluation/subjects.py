"""What is to be looked at, from a folder: a trained model, clips for it, and what its run has measured; and its figures
on the disk.

    subject, place = open_subject("runs/quickstart")
    written = write_figures(subject, place.output, ["futures", "curves"])
"""

import json
import logging
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from jaxtyping import Int
from torch import Tensor

from latentcast import inspection
from latentcast.cli import UserError
from latentcast.config import instantiate, load_config, load_pipeline_config
from latentcast.data.base import EmptySplitError, ShownClips, VideoDataset
from latentcast.data.store.latent_cache import LatentCacheDataset
from latentcast.data.video.folder import (
    list_videos,
    nearest_stride,
    no_videos,
    read_places,
    sampled_places,
    sampled_rate,
)
from latentcast.data.video.reader import DEFAULT_RATE, VideoError, probe
from latentcast.data.video.writer import write_drawing
from latentcast.figures import Drawing
from latentcast.files import read_json, told, write_json
from latentcast.inspection import ROLLOUT, Subject, count_codes
from latentcast.modeling import load_model
from latentcast.pipelines.base import VideoPipeline
from latentcast.saved import CONFIG, INDEX, STAGES, pipeline_folder
from latentcast.targets import nearest
from latentcast.tokenizers.base import LatentSpec
from latentcast.training.metrics_file import read_metrics
from latentcast.zoo import EXAMPLES, read_examples

from .report import read_maps
from .results import read_result

logger = logging.getLogger("latentcast")

WRITTEN = "figures.json"  # beside the pictures: their files, captions and numbers, by name
N_FRAMES = 10  # of clips of a tokenizer alone, at least; after the context, of a data set that is named
N_INPUT = 16  # frames after the context, of videos
OTHER_TIMES = ("fps_multiplier", "frame_times")  # sampler options
MOST_COUNTED = 20_000  # frames of a latents cache whose codes are counted


@dataclass(frozen=True)
class Place:
    """Where a model lies.

    Attributes:
        folder: as it was given. run: of the run that it belongs to, or None.
        pipeline, tokenizer: the folder of either; the other is None.
    """

    folder: Path
    run: Path | None
    pipeline: Path | None = None
    tokenizer: Path | None = None

    @property
    def home(self) -> Path:
        return self.run or (self.folder if self.folder.is_dir() else Path())

    @property
    def output(self) -> Path:
        """Where its figures go."""
        return self.home / "figures"

    @property
    def name(self) -> str:
        """What to call it: as its run or folder is called, or on the hub."""
        return self.home.resolve().name if self.folder.is_dir() else str(self.folder)


def find_place(target: str | Path) -> Place:
    """The Place of a run's folder, that of a pipeline or of a tokenizer, or a pipeline's ``OWNER/NAME``.

    Raises:
        UserError, OSError: no trained model there.
    """
    folder = Path(os.path.expanduser(target))
    if (folder / "config.yaml").is_file():
        if (folder / "pipeline" / INDEX).is_file():
            return Place(folder, folder, pipeline=folder / "pipeline")
        if (folder / "tokenizer" / CONFIG).is_file():
            return Place(folder, folder, tokenizer=folder / "tokenizer")
        raise UserError(f"{target}: no trained model in this run yet: neither pipeline/ nor tokenizer/")
    run = folder.parent if (folder.parent / "config.yaml").is_file() else None
    if (folder / CONFIG).is_file() and not (folder / INDEX).is_file():
        return Place(folder, run, tokenizer=folder)
    return Place(folder, run, pipeline=pipeline_folder(target))


def open_subject(
    target: str | Path,
    *,
    overrides: Sequence[str] = (),
    sampler: dict | None = None,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
    n_clips: int = 4,
    n_frames: int | None = None,
    n_context: int | None = None,
    num_samples: int = 4,
    seed: int = 0,
    videos: str | Path | None = None,
    data: str | None = None,
) -> tuple[Subject, Place]:
    """A Subject of what lies in a folder.

    Args:
        target: see ``find_place``.
        overrides: of the experiment whose data set is shown, ["data.root=PATH"].
        sampler: options of the prior's sampler, by name.
        device, dtype: of the models; the dtype of a pipeline's.
        n_clips: how many are looked at. n_frames: after the context; None: as many as in training.
        n_context: given frames; None: as in training.
        num_samples, seed: see Subject.
        videos: path of a video or of a folder of some, in the place of the run's data set.
        data: a name under configs/data, likewise, of a pipeline.
    Returns:
        (Subject, Place)
    Raises:
        UserError, ValueError, OSError: no trained model there, an unknown option, or no clips to show.
    """
    place, sampler = find_place(target), dict(sampler or {})
    pipe = tokenizer = None
    if place.pipeline is not None:
        pipe = VideoPipeline.from_pretrained(place.pipeline, dtype=dtype).to(device)
        pipe.set_progress_bar_config(desc="sampling", leave=False)
        known = pipe.prior.sampler_options()
        for name in sampler:
            if name not in known:
                kind = type(pipe.prior).__name__
                raise UserError(f"{name}=: no option of the sampler of {kind}{nearest(name, known) if known else ''}")
            if name in OTHER_TIMES:
                raise UserError(f"{name}: expected none, since figures show the data's frames; half_steps shows others")
        spec = pipe.prior.config.latent_spec
        n_context = n_context or pipe.config.n_context or max(5, pipe.prior.min_context)
    else:
        tokenizer = load_model(place.tokenizer).to(device)
        spec, n_context = tokenizer.latent_spec, n_context or 1
    if videos is not None:
        wanted = n_context + ROLLOUT * (n_frames or N_INPUT)
        trained = {} if pipe is None else {"fps": pipe.config.fps, "crop": pipe.config.crop}
        fixed = read_videos(videos, spec, n_clips, wanted, **trained)
        source = Source(f"clips of {Path(videos).name}", n_context + N_INPUT, fixed=fixed)
    else:
        source = find_source(place, overrides, data, pipe, n_context, n_frames)
    length = n_context + n_frames if n_frames else source.n_frames
    clips = source.clips(n_clips, max(length or 0, N_FRAMES) if pipe is None else length)
    results, maps = read_results(place.run)
    subject = Subject(
        clips,
        tokenizer,
        pipe,
        n_context,
        num_samples=num_samples,
        sampler=sampler,
        seed=seed,
        label=f"{place.name}, {source.what}",
        counts=lambda: cached_counts(place.run, spec),
        histories=read_histories(place.run),
        results=results,
        maps=maps,
        longer=lambda n: source.longer(n_clips, n),
    )
    return subject, place


@dataclass
class Written:
    """What ``write_figures`` has done, by the figures' names.

    Attributes:
        files: paths of pictures, and of videos under ``NAME_video``. left_out: why the model has no such figure.
        failed: why drawing it did not end well.
    """

    files: dict = field(default_factory=dict)
    left_out: dict = field(default_factory=dict)
    failed: dict = field(default_factory=dict)


def write_figures(
    subject: Subject,
    folder: str | Path,
    names: Sequence[str] | None = None,
    drawn: Callable[[str, Drawing], object] | None = None,
) -> Written:
    """Draw figures, all that the subject has or the named ones, into ``folder``; what one fails for costs no other.

    ``folder/figures.json`` has them by name: ``files`` ("png", "mp4" -> name), ``caption`` and ``numbers``; those of
    earlier calls stay in it as long as their files are there.

    Args:
        drawn: called with name and Drawing after each is written.
    Returns:
        Written
    Raises:
        ValueError: an unknown name.
    """
    lacks = {name: reason for name, reason in inspection.reasons(subject, names).items() if reason}
    written, descriptions = Written(left_out=lacks), {}

    def failed(name, error):
        written.failed[name] = told(error, name)
        logger.warning("%s: failed: %s", name, written.failed[name])

    for name, drawing in inspection.draw(subject, names, failed):
        files = {suffix.removeprefix("."): path for suffix, path in write_drawing(folder / name, drawing).items()}
        written.files[name] = str(files["png"])
        if "mp4" in files:
            written.files[f"{name}_video"] = str(files["mp4"])
        files = {kind: path.name for kind, path in files.items()}
        descriptions[name] = {"files": files, "caption": drawing.caption, "numbers": drawing.numbers}
        if drawn is not None:
            drawn(name, drawing)
    if descriptions:  # JSON has no NaN: null stands for it
        descriptions = json.loads(json.dumps(descriptions), parse_constant=lambda name: None)
        write_json(folder / WRITTEN, read_figures(folder) | descriptions)
    return written


def read_figures(folder: str | Path) -> dict[str, dict]:
    """What ``folder/figures.json`` has by name, of figures whose files are there; {} where it is missing or damaged."""
    folder = Path(folder)
    try:
        known = read_json(folder / WRITTEN)
        return {name: found for name, found in known.items() if (folder / found["files"]["png"]).is_file()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return {}


class Source:
    """Clips to look at.

    Args:
        what: in words. n_frames: of a clip, where nothing else is asked for.
        dataset: a VideoDataset, or None. fixed: ShownClips in its place.
        trained_on: whether the clips are of the train split.
    """

    def __init__(
        self,
        what: str,
        n_frames: int | None,
        dataset: VideoDataset | None = None,
        fixed: ShownClips | None = None,
        trained_on: bool = False,
    ) -> None:
        self.what, self.n_frames, self.dataset, self.fixed, self.trained_on = what, n_frames, dataset, fixed, trained_on

    def clips(self, n_clips: int, n_frames: int | None) -> ShownClips:
        """ShownClips of that many frames, or of as many as there are."""
        if self.fixed is None and n_frames == self.dataset.clip_length:
            return ShownClips.of(self.dataset, n_clips, self.trained_on)
        return self.longer(n_clips, n_frames)

    def longer(self, n_clips: int, n_frames: int | None) -> ShownClips:
        """The same, from the beginnings of the videos."""
        if self.fixed is None:
            return ShownClips.beginnings(self.dataset, n_clips, n_frames, self.trained_on)
        return replace(self.fixed, frames=self.fixed.frames[:n_clips, :n_frames], videos=self.fixed.videos[:n_clips])


def find_source(
    place: Place,
    overrides: Sequence[str],
    data: str | None,
    pipe: VideoPipeline | None,
    n_context: int | None,
    n_frames: int | None,
) -> Source:
    """Where the clips come from: a data set that is named, that of the run, or the pipeline's examples."""
    folder = place.pipeline or place.tokenizer
    if data is not None:
        if place.pipeline is None:
            raise UserError("--data: goes with a pipeline; a tokenizer takes --input, or its run's folder")
        length = n_context + (n_frames or N_FRAMES)
        config = load_pipeline_config(place.pipeline, data, overrides, clip_length=length)
    elif place.run is not None:
        config = load_config(str(place.run / "config.yaml"), [*overrides, f"run_dir={json.dumps(str(place.run))}"])
    elif (folder / EXAMPLES).is_file():
        frames = read_examples(folder)
        names = [f"example {number}" for number in range(1, len(frames) + 1)]
        return Source("example clips", None, fixed=ShownClips(frames, pipe.config.fps or DEFAULT_RATE, names))
    else:
        raise UserError(
            f"{place.folder}: no run with a data set and no example clips here; give --input VIDEO_OR_FOLDER, or "
            "--data NAME data.root=PATH"
        )
    if config.data is None:
        raise UserError(f"{place.run}: its config names no data; give --input VIDEO_OR_FOLDER, or --data NAME")
    make = instantiate(config.data)
    for split in ("test", "val", "train"):
        try:
            dataset = make(split=split)
        except EmptySplitError:
            if split == "train":
                raise
        else:
            if len(dataset):
                break
    what = "TRAINING clips, as none are held out" if split == "train" else f"{split} clips"
    return Source(what, dataset.clip_length, dataset, trained_on=split == "train")


def read_videos(
    path: str | Path, spec: LatentSpec, n_clips: int, n_frames: int, fps: float | None = None, crop: str = "center"
) -> ShownClips:
    """The first frames of a video, or of videos below a folder -> ShownClips, of as many as all have.

    Args:
        spec: a ``latent_spec``, of whose frames theirs become.
        n_clips, n_frames: the most.
        fps: frames are left out so that the rate is nearest to this one, that of the training; None: all are taken.
        crop: how they get to the shape of the model's frames: see ``fit_frames``.
    Raises:
        UserError: nothing there that can be used.
    """
    path = Path(path)
    if not path.exists():
        raise UserError(f"--input {path}: no such file or folder")
    videos = [path] if path.is_file() else [path / name for name in list_videos(path)]
    if not videos:
        raise UserError(f"--input {no_videos(path)}")
    found, rate, problems, size = {}, fps or DEFAULT_RATE, [], (spec["frame_height"], spec["frame_width"])
    for video in videos:
        if len(found) == n_clips:
            break
        try:
            info = probe(video, backend="packets")
            stride = nearest_stride(info, fps)
            n, rate = sampled_rate(info, stride)
            places = sampled_places(info, range(min(n, n_frames)), stride)
            found[video.name] = read_places(video, places, size, spec["frame_channels"], crop)
        except VideoError as error:
            problems.append(str(error))
            logger.warning("skipped: %s", error)
    if not found:
        raise UserError(f"--input {path}: no video can be used: {'; '.join(problems[:3])}")
    shortest = min(map(len, found.values()))
    return ShownClips(torch.stack([frames[:shortest] for frames in found.values()]), rate, list(found))


def cached_counts(run: Path | None, spec: LatentSpec) -> list[Int[Tensor, " _"]] | None:
    """How often each code occurs in a run's latents cache, of up to ``MOST_COUNTED`` frames; None without one."""
    for split in ("train", "val", "test") if run else ():
        root = run / "latents" / split
        if not (root / "manifest.json").is_file():
            continue
        try:
            cache = LatentCacheDataset(root, 1, split=split)
            if cache.space != "codes" or cache.spec != spec:
                return None
            total, n = None, 0
            for index in range(len(cache.videos)):
                codes = cache.read_video(index)
                counts = count_codes(codes.long(), spec["codebook_sizes"])
                total, n = counts if total is None else [a + b for a, b in zip(total, counts)], n + len(codes)
                if n >= MOST_COUNTED:
                    break
            return total
        except (OSError, ValueError) as error:
            logger.warning("%s: its codes are not counted: %s", root, error)
    return None


def read_histories(run: Path | None) -> dict[str, list]:
    """stage -> rows (step, name, value) of the run's metrics; {} without a run."""
    paths = {stage: run / "metrics" / f"{stage}.csv" for stage in STAGES} if run else {}
    return {stage: read_metrics(path) for stage, path in paths.items() if path.is_file()}


def read_results(run: Path | None) -> tuple[dict | None, tuple[dict, str] | None]:
    """The run's newest evaluation with curves, and its maps of CRPS with their title; None for what is not there."""
    paths = (run / "metrics").glob("*.json") if run else ()
    for path in sorted(paths, key=lambda path: path.stat().st_mtime, reverse=True):
        try:
            result, (maps, title) = read_result(path), read_maps(path)
        except (OSError, ValueError):  # another file
            continue
        if any(entry.get("per_frame") for entry in result["metrics"].values()):
            return result, (maps, title) if maps else None
    return None, None
