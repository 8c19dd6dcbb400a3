"""Draw figures of a trained model: python tools/figures.py RUN_DIR|PIPELINE [NAME ...] [key=value ...]

From a run's folder, or that of a pipeline or tokenizer, every figure of the papers that the model has, or those that
are named. The clips are held-out ones of the run's own data set (data.root=... and other keys of it say where it is
now), the pipeline's example clips, or those of --input or --data. Other key=value are options of the prior's sampler,
for instance temperature=0.9. What an evaluation or a latents cache of the run has measured over more clips comes from
there. Beside the pictures, figures.json holds their captions and numbers.
"""

import argparse
import json
import logging
import os
from pathlib import Path

from latentcast.cli import Findings, UserError, parse_options, pick_device, prepare_run_dir, run_tool, user_path

logger = logging.getLogger("latentcast")

DATA_KEYS = ("data", "tokenizer", "prior", "cache", "frame_size", "channels", "clip_length")  # of an experiment
N_FRAMES = 10  # of clips of a tokenizer alone, at least; after the context, of --data
MOST_COUNTED = 20_000  # frames of a latents cache whose codes are counted


def main(args):
    from latentcast.targets import nearest

    overrides = [word for word in args.words if "=" in word]
    names = [word for word in args.words if "=" not in word] or None
    for name, least in (("n_clips", 1), ("num_samples", 1), ("n_frames", 1), ("n_context", 1)):
        value = getattr(args, name)
        if value is not None and value < least:
            raise UserError(f"--{name.replace('_', '-')}: expected at least {least}, found {value}")
    of_data = [word for word in overrides if word.partition("=")[0].partition(".")[0] in DATA_KEYS]
    sampler = parse_options([word for word in overrides if word not in of_data])
    place = Place.of(args.target)
    logger.info("%s: loading", place.folder)

    from latentcast import inspection
    from latentcast.data.video_writer import write_drawing
    from latentcast.files import told, write_json
    from latentcast.modeling import load_model
    from latentcast.pipelines.base import VideoPipeline

    for name in names or ():
        if name not in inspection.FIGURES:
            raise UserError(f"{name!r}: no figure of this name{nearest(name, inspection.FIGURES)}")
    device, pipe, tokenizer = pick_device(args.device), None, None
    if place.pipeline is not None:
        pipe = VideoPipeline.from_pretrained(place.pipeline).to(device)
        pipe.set_progress_bar_config(desc="sampling", leave=False)
        unknown = [name for name in sampler if name not in pipe.prior.sampler_options()]
        if unknown:
            hint = nearest(unknown[0], pipe.prior.sampler_options())
            raise UserError(f"{unknown[0]}=: no option of the sampler of {type(pipe.prior).__name__}{hint}")
        spec = pipe.prior.config.latent_spec
    else:
        tokenizer = load_model(place.tokenizer).to(device)
        spec = tokenizer.latent_spec
    n_context = args.n_context or (pipe and (pipe.config.n_context or max(5, pipe.prior.min_context))) or 1
    source = find_source(place, args, of_data, spec, pipe)
    n_frames = n_context + args.n_frames if args.n_frames else source.n_frames
    if pipe is None:
        n_frames = max(n_frames or 0, N_FRAMES)
    clips = source.clips(args.n_clips, n_frames)
    label = f"{place.name}, {source.what}"
    results, maps = read_results(place.run)
    subject = inspection.Subject(
        clips,
        tokenizer,
        pipe,
        n_context,
        num_samples=args.num_samples,
        sampler=sampler,
        seed=args.seed,
        label=label,
        counts=lambda: cached_counts(place.run, spec),
        histories=read_histories(place.run),
        results=results,
        maps=maps,
        longer=lambda length: source.longer(args.n_clips, length),
    )
    output = prepare_run_dir(args.output or place.output, "--output")
    lacks = {name: reason for name, reason in inspection.reasons(subject, names).items() if reason}
    for name, reason in lacks.items():
        logger.log(logging.WARNING if names else logging.INFO, "%s: not of this model: %s", name, reason)
    files, told_of, failed = {}, {}, {}

    def failing(name, error):
        failed[name] = told(error, name)
        logger.warning("%s: failed: %s", name, failed[name])

    for name, drawing in inspection.draw(subject, names, failing):
        written = write_drawing(output / name, drawing)
        files[name] = str(written[".png"])
        if ".mp4" in written:
            files[f"{name}_video"] = str(written[".mp4"])
        kinds = {suffix.removeprefix("."): path.name for suffix, path in written.items()}
        told_of[name] = {"files": kinds, "caption": drawing.caption, "numbers": drawing.numbers}
        logger.info("%s: %s", files[name], drawing.caption)
    index = output / INDEX
    if files:
        write_json(index, {**known_figures(index), **without_bad(told_of)})
    elif not failed:
        raise UserError(f"{place.folder}: none of these figures: {'; '.join(f'{k}: {v}' for k, v in lacks.items())}")
    found = {"files": files, "left_out": lacks, "failed": failed, "output": str(output)}
    if failed:
        raise Findings(f"{len(failed)} figures failed, first: {next(iter(failed.values()))}", found)
    return found


INDEX = "figures.json"  # beside the pictures: their files, captions and numbers, by name


def known_figures(index):
    """What an earlier call drew, of which the files are still there."""
    from latentcast.files import read_json

    try:
        known = read_json(index) if index.is_file() else {}
        return {name: told for name, told in known.items() if (index.parent / told["files"]["png"]).is_file()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):  # to be replaced
        return {}


def without_bad(told_of):
    """JSON has no NaN: null stands for numbers that are not finite."""
    return json.loads(json.dumps(told_of), parse_constant=lambda name: None)


class Place:
    """Where a model lies: ``folder`` as it was given; ``run``, the run that it belongs to, or None; ``pipeline`` or
    ``tokenizer``, the folder of either; ``output``, where its figures go, and ``name``, what to call it."""

    def __init__(self, folder, run, pipeline=None, tokenizer=None):
        self.folder, self.run, self.pipeline, self.tokenizer = folder, run, pipeline, tokenizer
        home = run or (folder if folder.is_dir() else Path())
        self.output, self.name = home / "figures", home.resolve().name

    @classmethod
    def of(cls, target):
        from latentcast.saved import CONFIG, INDEX, pipeline_folder

        folder = Path(os.path.expanduser(target))
        if (folder / "config.yaml").is_file():
            if (folder / "pipeline" / INDEX).is_file():
                return cls(folder, folder, pipeline=folder / "pipeline")
            if (folder / "tokenizer" / CONFIG).is_file():
                return cls(folder, folder, tokenizer=folder / "tokenizer")
            raise UserError(f"{target}: no trained model in this run yet: neither pipeline/ nor tokenizer/")
        run = folder.parent if (folder.parent / "config.yaml").is_file() else None
        if (folder / CONFIG).is_file() and not (folder / INDEX).is_file():
            return cls(folder, run, tokenizer=folder)
        return cls(folder, run, pipeline=pipeline_folder(target))


class Source:
    """Clips to look at.

    Args:
        what: in words. n_frames: of a clip in the training, or None.
        dataset: a VideoDataset, or None. fixed: ShownClips in its place.
    """

    def __init__(self, what, n_frames, dataset=None, fixed=None, trained_on=False):
        self.what, self.n_frames, self.dataset, self.fixed, self.trained_on = what, n_frames, dataset, fixed, trained_on

    def clips(self, n_clips, n_frames):
        from latentcast.inspection import ShownClips

        if self.fixed is not None:
            return cut(self.fixed, n_clips, n_frames)
        if n_frames == self.dataset.clip_length:
            return ShownClips.of(self.dataset, n_clips, self.trained_on)
        return self.longer(n_clips, n_frames)

    def longer(self, n_clips, n_frames):
        from latentcast.inspection import ShownClips

        if self.fixed is not None:
            return cut(self.fixed, n_clips, n_frames)
        return ShownClips.beginnings(self.dataset, n_clips, n_frames, self.trained_on)


def cut(clips, n_clips, n_frames):
    from dataclasses import replace

    return replace(clips, frames=clips.frames[:n_clips, :n_frames], videos=clips.videos[:n_clips])


def find_source(place, args, overrides, spec, pipe):
    """Where the clips come from: --input, --data, the pipeline's examples, or the run's own data set."""
    from latentcast.config import instantiate, load_config, load_pipeline_config
    from latentcast.inspection import ShownClips
    from latentcast.zoo import EXAMPLES, read_examples

    n_given = args.n_context or (pipe and pipe.config.n_context) or 1
    if args.input is not None:
        fixed = read_input(args.input, args, spec, pipe)
        return Source(f"clips of {args.input.name}", n_given + (args.n_frames or 16), fixed=fixed)
    folder = place.pipeline or place.tokenizer
    if args.data is not None:
        if place.pipeline is None:
            raise UserError("--data: goes with a pipeline; a tokenizer takes --input, or its run's folder")
        length = n_given + (args.n_frames or N_FRAMES)
        config = load_pipeline_config(place.pipeline, args.data, overrides, clip_length=length)
    elif place.run is not None:
        config = load_config(str(place.run / "config.yaml"), [*overrides, f"run_dir={json.dumps(str(place.run))}"])
    elif (folder / EXAMPLES).is_file():
        frames = read_examples(folder)
        names = [f"example {number}" for number in range(1, len(frames) + 1)]
        return Source("example clips", None, fixed=ShownClips(frames, pipe.config.fps or 10, names))
    else:
        raise UserError(
            f"{place.folder}: no run with a data set and no example clips here; give --input VIDEO_OR_FOLDER, or "
            "--data NAME data.root=PATH"
        )
    if config.data is None:
        raise UserError(f"{place.run}: its config names no data; give --input VIDEO_OR_FOLDER, or --data NAME")
    dataset, split = open_split(instantiate(config.data))
    what = "TRAINING clips, as none are held out" if split == "train" else f"{split} clips"
    return Source(what, dataset.clip_length, dataset, trained_on=split == "train")


def open_split(make):
    """The first of the splits test, val and train that has videos -> (data set, split)."""
    from latentcast.data.base import EmptySplitError

    for split in ("test", "val", "train"):
        try:
            dataset = make(split=split)
            if len(dataset):
                return dataset, split
        except EmptySplitError:
            if split == "train":
                raise
    raise UserError("data: no clips in any split")


def read_input(path, args, spec, pipe):
    """Clips of --input, at the rate of the training -> ShownClips."""
    import torch

    from latentcast.data.video_folder import list_videos, no_videos, read_places, sampled_places, sampled_rate
    from latentcast.data.video_reader import DEFAULT_RATE, VideoError, probe
    from latentcast.inspection import ROLLOUT, ShownClips

    if not path.exists():
        raise UserError(f"--input {path}: no such file or folder")
    if spec["frame_height"] != spec["frame_width"]:
        raise UserError(f"expected square frames, found {spec['frame_height']}x{spec['frame_width']}")
    videos = [path] if path.is_file() else [path / name for name in list_videos(path)]
    if not videos:
        raise UserError(f"--input {no_videos(path)}")
    wanted = (args.n_context or (pipe and pipe.config.n_context) or 1) + ROLLOUT * (args.n_frames or 16)
    found, fps, problems = {}, (pipe and pipe.config.fps) or DEFAULT_RATE, []
    for video in videos:
        if len(found) == args.n_clips:
            break
        try:
            info = probe(video, backend="packets")
            stride = max(1, round(info.fps / fps)) if pipe is not None and pipe.config.fps else 1
            n, rate = sampled_rate(info, stride)
            places = sampled_places(info, range(min(n, wanted)), stride)
            found[video.name] = read_places(video, places, spec["frame_height"], spec["frame_channels"])
            fps = rate
        except VideoError as error:
            problems.append(str(error))
            logger.warning("skipped: %s", error)
    if not found:
        raise UserError(f"--input {path}: no video can be used: {'; '.join(problems[:3])}")
    shortest = min(map(len, found.values()))
    return ShownClips(torch.stack([frames[:shortest] for frames in found.values()]), fps, list(found))


def cached_counts(run, spec):
    """How often each code occurs in the run's latents cache, of up to ``MOST_COUNTED`` frames; None without one."""
    from latentcast.data.latent_cache import LatentCacheDataset
    from latentcast.inspection import count_codes

    for split in ("train", "val", "test"):
        root = run and run / "latents" / split
        if root is None or not (root / "manifest.json").is_file():
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


def read_histories(run):
    """stage -> rows of the run's metrics."""
    from latentcast.inspection import STAGES

    found = {stage: run / "metrics" / f"{stage}.csv" for stage in STAGES} if run else {}
    found = {stage: path for stage, path in found.items() if path.is_file()}
    if not found:
        return {}
    from latentcast.training.loggers import read_metrics  # which imports Lightning

    return {stage: read_metrics(path) for stage, path in found.items()}


def read_results(run):
    """The run's newest evaluation and its maps of CRPS; None for what is not there."""
    from latentcast.evaluation.comparison import read_result
    from latentcast.evaluation.report import read_maps

    paths = sorted((run / "metrics").glob("*.json"), key=lambda path: path.stat().st_mtime) if run else []
    for path in reversed(paths):
        try:
            result = read_result(path)
            maps, title = read_maps(path)
        except (OSError, ValueError):  # another file
            continue
        if any(entry.get("per_frame") for entry in result["metrics"].values()):
            return result, (maps, title) if maps else None
    return None, None


def make_parser():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "target", metavar="RUN_DIR|PIPELINE", help="folder of a run, a pipeline or a tokenizer, or OWNER/NAME"
    )
    parser.add_argument(
        "words", nargs="*", metavar="NAME key=value", help="figures (default: all that the model has), and options"
    )
    parser.add_argument("--output", type=user_path, metavar="DIR", help="default: figures/ in the run's folder")
    parser.add_argument(
        "--input", type=user_path, metavar="VIDEO_OR_FOLDER", help="clips to show, instead of the run's"
    )
    parser.add_argument("--data", metavar="NAME", help="a data set under configs/data, with data.root=PATH")
    parser.add_argument("--n-clips", type=int, default=4, help="clips to look at (default: 4)")
    parser.add_argument("--n-frames", type=int, help="frames after the context (default: as in training)")
    parser.add_argument("--n-context", type=int, help="frames given (default: as in training)")
    parser.add_argument("--num-samples", type=int, default=4, help="futures of each clip (default: 4)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps, ...")
    return parser


if __name__ == "__main__":
    run_tool(main, make_parser())
