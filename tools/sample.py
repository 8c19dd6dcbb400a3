"""Predict the futures of videos with a saved pipeline.

Writes, for each video, NAME.mp4 and NAME.gif with the true continuation (where the video is long enough) beside the
predicted ones, and one contact_sheet.png. Given frames have a green border, predicted ones an orange one. Options of
the prior's sampler follow as key=value, for instance temperature=0.9 top_k=50. With fps_multiplier=2 the videos have
twice the context's rate, and given and true frames stay for two.
"""

import argparse
import itertools
import logging
import math
import os
import time
from pathlib import Path

from latentcast.cli import UserError, parse_options, pick_device, prepare_run_dir, run_tool, user_path

logger = logging.getLogger("latentcast")

GIVEN, PREDICTED, TRUE = (-0.6, 0.5, -0.4), (1.0, 0.2, -0.8), (0.6, 0.6, 0.6)  # colours, in [-1, 1]
BORDER = 2  # pixels
SHEET_VIDEOS = 8  # videos on the contact sheet
SMALLEST = 128  # frames are enlarged to about this many pixels


def make_parser():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--pipeline",
        required=True,
        metavar="DIR",
        type=os.path.expanduser,
        help="what train_prior.py saved, or OWNER/NAME",
    )
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
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps, ...")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float16"])
    parser.add_argument("options", nargs="*", metavar="key=value", help="options of the prior's sampler")
    return parser


def main(args):
    import torch

    from latentcast.data.pictures import contact_sheet, side_by_side
    from latentcast.data.video_reader import VideoError
    from latentcast.data.video_writer import write_image, write_video
    from latentcast.pipelines.base import VideoPipeline

    started = time.perf_counter()
    for name, least in (("n_frames", 1), ("n_context", 1), ("num_samples", 1), ("start", 0), ("frame_stride", 1)):
        value = getattr(args, name)
        if value is not None and value < least:
            raise UserError(f"--{name.replace('_', '-')}: expected at least {least}, found {value}")
    if args.fps is not None and not 0 < args.fps < float("inf"):
        raise UserError(f"--fps: expected a rate above 0, found {args.fps}")
    sampler = parse_options(args.options)
    multiplier = sampler.get("fps_multiplier", 1)  # what it may be is the sampler's to say
    multiplier = multiplier if isinstance(multiplier, (int, float)) and multiplier > 0 else 1
    videos = find_videos(args.input)
    pipe = VideoPipeline.from_pretrained(args.pipeline, dtype=getattr(torch, args.dtype))
    pipe.to(pick_device(args.device))
    output = args.output or (Path(args.pipeline).parent if Path(args.pipeline).is_dir() else Path()) / "samples"
    if output.resolve() == (args.input if args.input.is_dir() else args.input.parent).resolve():
        raise UserError(f"--output {output}: this is where the input lies; its videos could be overwritten")
    prepare_run_dir(output, "--output")

    n_context = args.n_context or pipe.config.n_context or max(5, pipe.prior.min_context)
    outputs, skipped, sheet, predicting = [], {}, [], 0.0
    for video, name in videos.items():
        try:
            context, truth, fps = read_video(video, n_context, args, pipe, multiplier)
        except VideoError as error:
            logger.warning("skipped: %s", error)
            skipped[str(video)] = str(error)
            continue
        pipe.set_progress_bar_config(desc=name)
        began = time.perf_counter()
        futures = pipe(
            context,
            n_frames=args.n_frames,
            num_samples=args.num_samples,
            generator=torch.Generator().manual_seed(args.seed),  # each video's futures depend on it alone
            **sampler,
        ).frames[0]
        futures = futures.cpu()
        predicting += time.perf_counter() - began

        context, truth = held(context, truth, args.n_frames, multiplier)
        given = bordered(context, GIVEN)
        rows = [torch.cat([given, bordered(future, PREDICTED)]) for future in futures]
        if truth is not None:
            rows = [torch.cat([given, bordered(truth, TRUE)]), *rows]
        scale = max(1, round(SMALLEST / context.shape[-1]))
        for suffix in (".mp4", ".gif"):
            write_video(output / f"{name}{suffix}", side_by_side(rows, scale), fps * multiplier)
            outputs.append(str(output / f"{name}{suffix}"))
        if len(outputs) <= 2 * SHEET_VIDEOS:
            sheet += rows
            write_image(output / "contact_sheet.png", contact_sheet(sheet, max(1, scale // 2)))
    if not outputs:
        reasons = "; ".join(list(skipped.values())[:5])
        raise UserError(f"{args.input}: none of {len(skipped)} videos could be used: {reasons}")
    outputs.append(str(output / "contact_sheet.png"))
    n_predicted = (len(videos) - len(skipped)) * args.num_samples * args.n_frames
    return {
        "outputs": outputs,
        "skipped": list(skipped),
        "seconds": round(time.perf_counter() - started, 2),
        "frames_per_s": round(n_predicted / predicting, 2),
    }


def read_video(path, n_context, args, pipe, multiplier=1):
    """Context (n_context, C, H, W), the true frames of the time to predict (or None), and the rate of both."""
    from latentcast.data.video_folder import load_frames, sampled_places, sampled_rate
    from latentcast.data.video_reader import VideoError, iter_clip, probe

    spec = pipe.prior.config.latent_spec
    if spec["frame_height"] != spec["frame_width"]:
        raise UserError(f"{args.pipeline}: expected square frames, found {spec['frame_height']}x{spec['frame_width']}")
    info = probe(path, backend="packets")
    stride = args.frame_stride or (max(1, round(info.fps / pipe.config.fps)) if pipe.config.fps else 1)
    rate = (1, args.fps) if args.fps else (stride, None)
    available, fps = sampled_rate(info, *rate)
    end = args.start + n_context
    if available < end:
        raise VideoError(f"{path}: {end} frames are needed, {available} are there at {fps:.3g} frames per second")
    n_true = math.ceil(args.n_frames / multiplier)
    n_true = n_true if available >= end + n_true else 0
    places = sampled_places(info, range(args.start, end + n_true), *rate)
    for _ in itertools.islice(iter_clip(path, chunk=1), max(places) + 1):  # names damage, which reading would conceal
        pass
    frames = load_frames(path, places, spec["frame_height"], spec["frame_channels"], info=info)
    return frames[:n_context], frames[n_context:] if n_true else None, fps


def held(context, truth, n_frames, multiplier):
    """Context and truth at ``multiplier`` times their rate, each frame staying until the next -> the same two."""
    import torch

    last = len(context) - 1
    frames = context if truth is None else torch.cat([context, truth])
    times = torch.arange(-math.floor(last * multiplier), n_frames + 1) / multiplier + last
    places = (times + 1e-4).floor().long()  # 1e-4: times are rounded
    given = frames[places[:-n_frames]]
    return given, None if truth is None else frames[places[-n_frames:]]


def find_videos(path):
    """Video file -> name of its outputs, for a file or all videos under a folder."""
    from latentcast.data.video_folder import SUFFIXES

    if path.is_file():
        return {path: path.stem}
    if not path.is_dir():
        raise UserError(f"--input {path}: no such file or folder")
    files = [file for file in path.rglob("*") if file.suffix.lower() in SUFFIXES and not file.name.startswith(".")]
    if not files:
        raise UserError(f"--input {path}: no video files here; expected any of {', '.join(SUFFIXES)}")
    names = {}
    for file in sorted(files):
        name = "_".join(file.relative_to(path).with_suffix("").parts)
        names[file] = name if name not in names.values() else f"{name}_{file.suffix[1:]}"
    return names


def bordered(frames, colour):
    """(T, C, H, W) -> (T, 3, H + 2 * BORDER, W + 2 * BORDER), in a coloured frame."""
    import torch

    height, width = (size + 2 * BORDER for size in frames.shape[2:])
    canvas = torch.tensor(colour).view(1, 3, 1, 1).repeat(len(frames), 1, height, width)
    canvas[:, :, BORDER:-BORDER, BORDER:-BORDER] = frames
    return canvas


if __name__ == "__main__":
    run_tool(main, make_parser())
