"""Play a saved pipeline in the browser: keys choose the action, and the next frame is predicted, step by step.

A game begins with the first frames of a clip: of --input, of the run's data set, or of the pipeline's own examples. A
prior that is told nothing just goes on. Options of its sampler follow as key=value (temperature=0.9), and where the
run's data lie as data.root=PATH.

The page is served to this machine alone, unless --host says otherwise; ctrl-C ends it. The last line on stdout then
says how many frames were predicted, and how fast.
"""

import argparse
import logging
import signal
import threading

from latentcast.cli import (
    UserError,
    add_pipeline_arguments,
    parse_options,
    pick_device,
    pick_dtype,
    run_tool,
    usable_port,
    user_path,
)

logger = logging.getLogger("latentcast")

PORT = 7861


def make_parser():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_pipeline_arguments(parser)
    parser.add_argument("--input", metavar="VIDEO_OR_FOLDER", type=user_path, help="games begin with their frames")
    parser.add_argument("--n-clips", type=int, default=8, help="clips that are offered (default: 8)")
    parser.add_argument("--n-context", type=int, help="frames given (default: as in training)")
    parser.add_argument("--fps", type=float, help="speed at first, and of recordings (default: that of the clips)")
    parser.add_argument("--port", type=int, default=PORT, help=f"default: {PORT}; 0: any that is free")
    parser.add_argument("--host", default="127.0.0.1", help="0.0.0.0: whoever reaches this machine may play")
    parser.add_argument("options", nargs="*", metavar="key=value", help="of the prior's sampler, and data.root=PATH")
    return parser


def main(args):
    if args.n_clips < 1:
        raise UserError(f"--n-clips: expected at least 1, found {args.n_clips}")
    port = usable_port(args.host, args.port)
    overrides = [option for option in args.options if option.startswith("data.")]
    sampler = parse_options([option for option in args.options if option not in overrides])
    try:
        from latentcast import play
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] not in ("starlette", "uvicorn"):
            raise
        raise UserError('the game needs starlette and uvicorn: pip install "latentcast[demo]"') from None
    from latentcast.evaluation.subjects import open_subject

    device = pick_device(args.device)
    subject, place = open_subject(
        args.pipeline,
        overrides=overrides,
        sampler=sampler,
        device=device,
        dtype=pick_dtype(args.dtype, device),
        n_clips=args.n_clips,
        n_context=args.n_context,
        videos=args.input,
    )
    if subject.pipe is None:
        raise UserError(f"{args.pipeline}: expected a pipeline, found a tokenizer")
    n_context, there = subject.n_context, subject.clips.frames.shape[1]
    if there < n_context:
        raise UserError(f"{n_context} frames are needed to begin with, the clips have {there}")
    subject.pipe.set_progress_bar_config(disable=True)
    arcade = play.Arcade(
        lambda: play.Game(subject.pipe, subject.clips, n_context, sampler), place.name, args.fps or subject.clips.fps
    )
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    with play.serving(arcade, args.host, port) as address:
        try:
            logger.info("ready at %s (ctrl-C ends it)", address)
            threading.Event().wait()
        except KeyboardInterrupt:
            logger.info("ending")
    rate = arcade.n_predicted / arcade.busy if arcade.busy else None
    return {"address": address, "frames": arcade.n_predicted, "frames_per_s": rate and round(rate, 2)}


if __name__ == "__main__":
    run_tool(main, make_parser())
