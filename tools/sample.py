"""Predict the futures of videos with a saved pipeline.

Writes, for each video, NAME.mp4 and NAME.gif with the true continuation (where the video is long enough) beside the
predicted ones, in rows and columns where they are many, and one contact_sheet.png. All have their names; given frames
have a green border, predicted ones an orange one. A GIF shows at most 10 frames a second, and rests before it begins
again. A folder of numbered pictures is a video, too (see --image-fps). Options of the prior's sampler follow as
key=value, for instance temperature=0.9 top_k=50. With fps_multiplier=2 the videos have twice the context's rate, and
given and true frames stay for two.

Files that are of no use (damaged, too short, no video) are named and skipped. What cannot be read or written at the
moment is named, too; the status is then 1, after all others are done.
"""

import argparse
import errno
import hashlib
import logging
import os
import time
import unicodedata
from pathlib import Path

from latentcast.cli import (
    Findings,
    UserError,
    add_pipeline_arguments,
    parse_options,
    pick_device,
    pick_dtype,
    prepare_run_dir,
    run_tool,
    user_path,
)

logger = logging.getLogger("latentcast")

SHEET = "contact_sheet.png"
MOST_TOLD = 10**9  # bytes of the arrays of --conditions


def make_parser():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_pipeline_arguments(parser)
    parser.add_argument("--input", required=True, metavar="VIDEO_OR_FOLDER", type=user_path)
    parser.add_argument(
        "--output", metavar="DIR", type=user_path, help="default: samples/ beside the pipeline's folder"
    )
    parser.add_argument("--n-frames", type=int, default=16, help="frames to predict (default: 16)")
    parser.add_argument("--n-context", type=int, help="frames given (default: as in training)")
    parser.add_argument("--num-samples", type=int, default=4, help="futures for each video (default: 4)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--start", type=int, default=0, help="first frame given, counted at the rate of sampling")
    rate = parser.add_mutually_exclusive_group()
    rate.add_argument("--fps", type=float, help="resample videos to this rate (frames per second)")
    rate.add_argument("--frame-stride", type=int, help="take every n-th frame (default: nearest to training's rate)")
    parser.add_argument(
        "--image-fps", type=float, help="rate at which pictures in folders were taken (default: that of training)"
    )
    parser.add_argument(
        "--conditions",
        metavar="FILE.npz",
        type=user_path,
        help="what the prior is told of every video, arrays by name: a row for each given and predicted frame of those "
        "per frame; default: nothing",
    )
    parser.add_argument("options", nargs="*", metavar="key=value", help="options of the prior's sampler")
    return parser


def main(args):
    started = time.perf_counter()
    for name, least in (("n_frames", 1), ("n_context", 1), ("num_samples", 1), ("start", 0), ("frame_stride", 1)):
        value = getattr(args, name)
        if value is not None and value < least:
            raise UserError(f"--{name.replace('_', '-')}: expected at least {least}, found {value}")
    for name in ("fps", "image_fps"):
        value = getattr(args, name)
        if value is not None and not 0 < value < float("inf"):
            raise UserError(f"--{name.replace('_', '-')}: expected a rate above 0, found {value}")
    sampler = parse_options(args.options)
    multiplier = sampler.get("fps_multiplier", 1)  # what it may be is the sampler's to say
    multiplier = multiplier if isinstance(multiplier, (int, float)) and multiplier > 0 else 1
    from latentcast.saved import pipeline_folder

    if not args.input.exists():
        raise UserError(f"--input {args.input}: no such file or folder")
    folder = pipeline_folder(args.pipeline)
    logger.info("loading %s", args.pipeline)
    videos = find_videos(args.input)
    import torch  # which takes seconds, as what follows: mistakes in the arguments show before

    from latentcast.data.video.futures import Sheet, held, labelled_futures, layout, read_context
    from latentcast.data.video.reader import is_away
    from latentcast.data.video.writer import check_video, write_both
    from latentcast.figures.sheets import BORDER, labelled_size, rows_of
    from latentcast.files import error_numbers, printable, told
    from latentcast.pipelines.base import VideoPipeline

    device = pick_device(args.device)
    pipe = VideoPipeline.from_pretrained(folder, dtype=pick_dtype(args.dtype, device)).to(device)
    output = args.output or (Path(args.pipeline).parent if Path(args.pipeline).is_dir() else Path()) / "samples"
    if output.resolve() == (args.input if args.input.is_dir() else args.input.parent).resolve():
        raise UserError(f"--output {output}: this is where the input lies; its videos could be overwritten")
    spec = pipe.prior.config.latent_spec
    size = tuple(spec[f"frame_{side}"] + 2 * BORDER for side in ("height", "width"))
    scale, columns = layout(args.num_samples + 1, *size)
    try:
        check_video(Path("a.mp4"), *labelled_size(args.num_samples + 1, *size, scale, columns))  # GIFs may be larger
    except ValueError as error:
        raise UserError(f"--num-samples {args.num_samples}: {str(error).partition(': ')[2]}") from None
    prepare_run_dir(output, "--output")
    written = [f"{name}{suffix}" for name in videos.values() for suffix in (".mp4", ".gif")]
    earlier = sum((output / name).exists() for name in written)
    replaced = [f"{earlier} files"] * (earlier > 0) + [SHEET] * (output / SHEET).exists()
    if replaced:
        logger.warning("%s: replacing %s of an earlier run; --output DIR keeps them", output, " and ".join(replaced))

    if pipe.prior.deterministic and args.num_samples > 1:
        logger.info("%s draws nothing: one future of each video is all there is", type(pipe.prior).__name__)
        args.num_samples = 1
    n_context = args.n_context or pipe.config.n_context or max(5, pipe.prior.min_context)
    conditions = None if args.conditions is None else read_conditions(args.conditions, pipe.prior.conditions)
    outputs, skipped, failed, predicting, n_predicted = [], {}, {}, 0.0, 0
    sheet = Sheet(output / SHEET, *size)
    given = {"start": args.start, "fps": args.fps, "frame_stride": args.frame_stride}
    given |= {"image_fps": args.image_fps, "trained_fps": pipe.config.fps, "crop": pipe.config.crop}

    def leave_out(where, video, error):
        where[str(video)] = told(error, video)
        logger.warning("%s: %s", "skipped" if where is skipped else "failed", where[str(video)])

    for video, name in videos.items():
        try:
            context, truth, fps = read_context(video, spec, n_context, args.n_frames, multiplier, **given)
        except Exception as error:  # whatever one file leads to: the others are fine
            leave_out(failed if is_away(error) else skipped, video, error)
            continue
        pipe.set_progress_bar_config(desc=printable(name))
        began = time.perf_counter()
        try:
            futures = pipe(
                context,
                n_frames=args.n_frames,
                num_samples=args.num_samples,
                generator=torch.Generator().manual_seed(args.seed),  # each video's futures depend on it alone
                value_range=(-1, 1),
                conditions=conditions,
                **sampler,
            ).frames[0]
            futures = futures.cpu()
        except Exception as error:
            if not n_predicted:  # a matter of the options or the device, not of this video
                raise
            leave_out(failed, video, error)
            continue
        predicting += time.perf_counter() - began
        n_predicted += args.num_samples * args.n_frames

        context, truth = held(context, truth, args.n_frames, multiplier)
        rows = list(rows_of(context, truth, futures).items())
        try:
            frames = labelled_futures(rows, args.n_frames, fps * multiplier, scale, columns)
            outputs += map(str, write_both(output / name, frames, fps * multiplier))
            sheet.add(printable(name), rows, len(context))
        except Exception as error:
            leave_out(failed, video, error)
            if error_numbers(error) & {errno.ENOSPC, errno.EDQUOT}:  # for the others, too
                break
    if outputs:
        logger.info("%s: futures of %d videos", output, len(outputs) // 2)
    if sheet.n_left_out:
        logger.info(
            "%s shows the first %d videos and leaves out %d; each has its own mp4 and GIF",
            *(sheet.path, sheet.n_videos, sheet.n_left_out),
        )
    figures = {
        "outputs": outputs + sheet.outputs,
        "skipped": list(skipped),
        "failed": list(failed),
        "seconds": round(time.perf_counter() - started, 2),
        "frames_per_s": round(n_predicted / predicting, 2) if n_predicted else None,
    }
    if not outputs:
        reasons = "; ".join([*failed.values(), *skipped.values()][:5])
        raise UserError(f"{args.input}: none of {len(videos)} videos could be used: {reasons}")
    if failed:
        first = next(iter(failed.values()))
        raise Findings(f"{args.input}: {len(failed)} of {len(videos)} videos failed, first: {first}", figures)
    return figures


def read_conditions(path, declared):
    """The arrays of an npz file -> name -> tensor; UserError for a file that is none or has others than the prior's."""
    import numpy as np
    import torch

    try:
        with np.load(path, allow_pickle=False) as file:
            if (size := sum(part.file_size for part in file.zip.infolist())) > MOST_TOLD:  # zeros pack a thousandfold
                raise ValueError(f"{size / 1e6:.0f} MB, of at most {MOST_TOLD / 1e6:.0f}")
            found = {name: torch.from_numpy(file[name]) for name in file.files}
    except Exception as error:  # whatever lies there
        raise UserError(f"--conditions {path}: expected an npz file of numbers, found {error}") from None
    if found.keys() != declared.keys():
        names = [", ".join(sorted(side)) or "none" for side in (declared, found)]
        raise UserError(f"--conditions {path}: expected the arrays {names[0]}, found {names[1]}")
    return found


def find_videos(path):
    """Video (a file, or a folder of numbered pictures) -> name of its outputs, for a file or all below a folder.

    A name is the path below the folder without suffix and with "_" between its parts, shortened where it is too long.
    Where several files would have one name (on disks that do not tell A from a, too), later ones have their suffix or a
    checksum at its end.
    """
    from latentcast.files import shortened

    if path.is_file():
        return {path: shortened(path.stem)}
    from latentcast.data.video.folder import list_videos, no_videos
    from latentcast.data.video.pictures import is_sequence

    files = list_videos(path, is_sequence)
    if not files:
        raise UserError(f"--input {no_videos(path)}")
    names, taken = {}, set()
    for file in files:
        stem, suffix = os.path.splitext(path.resolve().name if file == "." else file.replace("/", "_"))
        if (path / file).is_dir():
            stem, suffix = stem + suffix, "_"
        digest = hashlib.sha256(os.fsencode(file)).hexdigest()
        for name in map(shortened, (stem, f"{stem}_{suffix[1:]}", f"{stem}-{digest[:8]}", digest)):
            folded = unicodedata.normalize("NFC", name).casefold()
            if folded not in taken:
                break
        taken.add(folded)
        names[path / file] = name
    return names


if __name__ == "__main__":
    run_tool(main, make_parser())
