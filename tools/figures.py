"""Draw figures of a trained model.

From a run's folder, or that of a pipeline or tokenizer, every figure of the papers that the model has, or those that
are named. The clips are held-out ones of the run's own data set (data.root=... and other keys of it say where it is
now), the pipeline's example clips, or those of --input or --data. Other key=value are options of the prior's sampler,
for instance temperature=0.9. What an evaluation or a latents cache of the run has measured over more clips comes from
there. Beside the pictures, figures.json holds their captions and numbers.
"""

import argparse
import logging

from latentcast.catalogue import complete_data
from latentcast.cli import Findings, UserError, parse_options, pick_device, prepare_run_dir, run_tool, user_path

logger = logging.getLogger("latentcast")

OF_EXPERIMENT = ("data", "frame_size", "channels", "clip_length")  # keys that are no sampler's


def main(args):
    overrides = [word for word in args.words if "=" in word]
    names = [word for word in args.words if "=" not in word] or None
    for name in ("n_clips", "num_samples", "n_frames", "n_context"):
        value = getattr(args, name)
        if value is not None and value < 1:
            raise UserError(f"--{name.replace('_', '-')}: expected at least 1, found {value}")
    of_data = [word for word in overrides if word.partition("=")[0].partition(".")[0] in OF_EXPERIMENT]
    sampler = parse_options([word for word in overrides if word not in of_data])
    logger.info("%s: loading", args.target)
    from latentcast.evaluation.subjects import open_subject, write_figures  # which takes seconds
    from latentcast.inspection import check_names

    check_names(names or ())
    subject, place = open_subject(
        args.target,
        overrides=of_data,
        sampler=sampler,
        device=pick_device(args.device),
        n_clips=args.n_clips,
        n_frames=args.n_frames,
        n_context=args.n_context,
        num_samples=args.num_samples,
        seed=args.seed,
        videos=args.input,
        data=args.data,
    )
    output = prepare_run_dir(args.output or place.output, "--output")

    def drawn(name, drawing):
        logger.info("%s: %s", output / f"{name}.png", drawing.caption)

    written = write_figures(subject, output, names, drawn)
    for name, reason in written.left_out.items():
        logger.log(logging.WARNING if names else logging.INFO, "%s: not of this model: %s", name, reason)
    if not written.files and not written.failed:
        reasons = "; ".join(f"{name}: {reason}" for name, reason in written.left_out.items())
        raise UserError(f"{args.target}: none of these figures: {reasons}")
    found = {**vars(written), "output": str(output)}
    if written.failed:
        raise Findings(f"{len(written.failed)} figures failed, first: {next(iter(written.failed.values()))}", found)
    return found


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
    data = parser.add_argument("--data", metavar="NAME", help="a data set, by its config's name, with data.root=PATH")
    data.completer = complete_data
    parser.add_argument("--n-clips", type=int, default=4, help="clips to look at (default: 4)")
    parser.add_argument("--n-frames", type=int, help="frames after the context (default: as in training)")
    parser.add_argument("--n-context", type=int, help="frames given (default: as in training)")
    parser.add_argument("--num-samples", type=int, default=4, help="futures of each clip (default: 4)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps, ...")
    return parser


if __name__ == "__main__":
    run_tool(main, make_parser())
