"""Prepare a benchmark data set: read its published files once, crop, resize, count and store its videos.

``prepare_dataset.py NAME --source DIR_OR_ARCHIVE --output DIR [--split PROTOCOL] [key=value ...]`` continues what an
earlier run left; ``prepare_dataset.py check DIR`` verifies a prepared set or any folder of videos. Several machines:
``--shards I/N``, the I-th of N processes that start whenever they do, or ``--engine ray``; see docs/scaling.md.
"""

import argparse
import os

from latentcast.cli import Findings, UserError, parse_options, prepare_run_dir, run_tool, user_path, user_place
from latentcast.data.sets import BENCHMARKS
from latentcast.shares import add_sharing, by_ray, is_for_ray, share_of

OWN = ("env", "policy", "frames", "actions")  # options of single sets that have an argument of their own


def make_parser():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    name = parser.add_argument("name", help=f"the data set ({', '.join(BENCHMARKS)}), or 'check'")
    name.completer = lambda **_: [*BENCHMARKS, "check"]
    parser.add_argument(
        "arguments", nargs="*", metavar="key=value", help="the data set's options; for check: the folder"
    )
    parser.add_argument("--source", type=user_path, help="folder or archive as published")
    parser.add_argument("--output", help="folder of the prepared set, or its URL, s3://BUCKET/NAME say")
    parser.add_argument("--split", help="protocol: which of the splits in use (the first one documented by default)")
    parser.add_argument("--env", help="gym: the environment, ALE/Pong-v5 say")
    parser.add_argument(
        "--policy", help="gym: random (the default), or FILE.py:function of (observation, env, generator)"
    )
    parser.add_argument("--frames", type=int, help="gym: how many to record, of all splits together")
    parser.add_argument(
        "--actions",
        metavar="PATTERN",
        help="folder: each video's table of actions, csv, npy or parquet, '{folder}/{stem}.csv' say; its row t was "
        "done after frame t, as in LeRobot; action_rows=between: the same without one of the last frame, as in Minari; "
        "action_rows=before: row t led to frame t",
    )
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="processes (default: one a core; 0: none)")
    parser.add_argument("--partial", action="store_true", help="accept a set with fewer videos than published")
    add_sharing(parser)
    parser.add_argument("--clip-length", type=int, default=1, help="check: shorter videos are named")
    return parser


def main(args):
    if args.name == "check":
        return check(args)
    from latentcast.config import call
    from latentcast.data.store.prepared import prepare
    from latentcast.targets import import_name

    if args.name not in BENCHMARKS:
        raise UserError(f"no data set {args.name!r}; expected one of {', '.join(BENCHMARKS)}, or check DIR")
    if args.workers < 0:
        raise UserError(f"--workers: expected at least 0, found {args.workers}")
    if args.output is None:
        raise UserError("--output: expected the folder to prepare into")
    given = {name: value for name in OWN if (value := getattr(args, name)) is not None}
    fixed = {"source": args.source, "protocol": args.split} | given
    benchmark = call(import_name(BENCHMARKS[args.name]), parse_options(args.arguments) | fixed, args.name)
    output = prepare_run_dir(user_place(args.output), "--output")
    if is_for_ray(args):
        alone = argparse.Namespace(**vars(args) | {"workers": 0})  # each of Ray's has one core
        return by_ray(main, alone, on_gpus=False)
    return prepare(benchmark, output, workers=args.workers, partial=args.partial, share=share_of(args))


def check(args):
    from latentcast.data.checking import check_folder

    if len(args.arguments) != 1:
        raise UserError(f"check: expected one folder, found {len(args.arguments)} arguments")
    figures = check_folder(user_place(args.arguments[0]), args.clip_length)
    if figures["problems"]:
        raise Findings(f"{args.arguments[0]}: {len(figures['problems'])} problems: {figures['problems'][0]}", figures)
    return figures


if __name__ == "__main__":
    run_tool(main, make_parser())
