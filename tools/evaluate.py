"""Evaluate a pipeline under a protocol: roll it out over test clips, measure, and write tables, plots and pictures.

``evaluate.py EXPERIMENT protocol=NAME [key=value ...]`` takes the experiment's pipeline and data;
``evaluate.py --pipeline DIR --data NAME protocol=NAME [key=value ...]`` any pipeline and data set. Results go to
``run_dir/metrics``, under the protocol's name. Continues what an earlier run left; the finished result of another
evaluation is replaced with ``evaluation.overwrite=true`` alone. Several GPUs: ``torchrun --nproc-per-node N
tools/evaluate.py ...``, or ``torchrun --nproc-per-node N -m latentcast evaluate ...``. Several machines:
``--shards I/N``, the I-th of N processes that start whenever they do, or ``--engine ray``; see docs/scaling.md.
"""

import argparse
import logging
import os
import time
from pathlib import Path

from latentcast.catalogue import complete_data, complete_words
from latentcast.cli import DTYPES, UserError, announce, pick_device, pick_dtype, prepare_run_dir, run_tool, user_path
from latentcast.command import command_line, named, typed
from latentcast.shares import add_sharing, by_ray, is_for_ray, share_of, turn

logger = logging.getLogger("latentcast")


def make_parser():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    words = parser.add_argument(
        "arguments", nargs="*", metavar="EXPERIMENT key=value", help="e.g. quickstart protocol=one_digit"
    )
    words.completer = complete_words
    parser.add_argument(
        "--pipeline", metavar="DIR", type=os.path.expanduser, help="a saved pipeline, instead of an experiment"
    )
    parser.add_argument("--data", metavar="NAME", help="a data set, by its config's name").completer = complete_data
    parser.add_argument(
        "--weights", metavar="DIR", type=user_path, help=f"the metric networks (see {named('fetch_weights')})"
    )
    parser.add_argument("--device", help="cpu, cuda, cuda:1, ... (default: a GPU where there is one)")
    parser.add_argument(
        "--dtype",
        default="float32",
        choices=DTYPES,
        help="of the pipeline; auto: bfloat16 where the hardware has it",
    )
    add_sharing(parser)
    return parser


def main(args):
    from latentcast.config import check_data

    began = time.perf_counter()
    config, folder = choose(args)
    if config.protocol is None:
        raise UserError(f"protocol: choose one by protocol=NAME ({typed('list')} protocols shows them)")
    if config.data is None:
        raise UserError("data: choose a data set by data=NAME")
    if not (folder / "model_index.json").is_file():
        raise UserError(f"{folder}: no pipeline here; run {named('train_prior')} first, or give --pipeline DIR")
    if args.weights is not None and not Path(args.weights).is_dir():
        raise UserError(f"--weights {args.weights}: no such folder")
    share = share_of(args, config.evaluation.overwrite)
    check_data(config)
    announce(config)
    if is_for_ray(args):
        return by_ray(main, args)
    from latentcast.config import instantiate, to_container  # torch takes seconds: mistakes in the config show before
    from latentcast.data.store.shards import difference_of
    from latentcast.distributed import default_device, process_group, rank_and_world, rank_zero_first
    from latentcast.evaluation.evaluator import Evaluation
    from latentcast.evaluation.results import read_result
    from latentcast.pipelines.base import VideoPipeline
    from latentcast.training.trackers import open_tracker

    protocol = instantiate(config.protocol)
    with process_group():
        device = pick_device(args.device) if args.device else default_device()
        pipe = VideoPipeline.from_pretrained(folder, dtype=pick_dtype(args.dtype, device)).to(device)
        with rank_zero_first():  # a data set may write an index or download when it is built
            dataset = instantiate(config.data, clip_length=protocol.n_frames)(split=protocol.split)
        metrics_dir = prepare_run_dir(config.run_dir) / "metrics"
        open_tracker(config, config.run_dir, "evaluation")  # refuses an unknown logger, before hours of work
        settings = to_container(config.evaluation)
        overwrite = settings.pop("overwrite")
        if settings["sampler"] is None:
            settings["sampler"] = to_container(config.preview.sampler)
        evaluation = Evaluation(
            pipe,
            dataset,
            protocol,
            metrics_dir / f"{protocol.name}.partial",
            label=label_of(folder),
            weights=args.weights,
            **settings,
        )
        result = metrics_dir / f"{protocol.name}.json"
        if result.is_file() and not overwrite:
            earlier = read_result(result)
            difference = difference_of({key: earlier.get(key) for key in evaluation.identity}, evaluation.identity)
            if difference:
                raise UserError(
                    f"{result}: a finished result of another evaluation ({difference}); give another run_dir, "
                    "protocol.name=..., or evaluation.overwrite=true"
                )
            logger.info("%s: finished before, nothing to do", result)
            return summary(earlier) | {"files": {"figures": str(result)}}
        evaluation.run(share)
        rank = rank_and_world()[0]
    if rank > 0:  # the group is closed: what follows is rank 0's alone
        return {}
    if share is None:
        return complete(config, folder, evaluation, metrics_dir, device, began)
    with turn(metrics_dir, "evaluation"):
        if result.is_file():  # another one of those that were the last has completed it
            return summary(read_result(result)) | {"files": {"figures": str(result)}}
        if pending := len(evaluation.pending()):
            logger.info("%s: share %s is done; %d groups of clips are others'", result, share, pending)
            return {"protocol": protocol.name, "pending_groups": pending}
        return complete(config, folder, evaluation, metrics_dir, device, began)


def complete(config, folder, evaluation, metrics_dir, device, began):
    """Join what was measured, and write all that shows it."""
    from latentcast.environment import git_commit, hardware
    from latentcast.evaluation.report import write_report

    logger.info("joining %d clips", len(evaluation.clips))
    results = evaluation.finish()
    seconds = {"measuring": evaluation.parts.seconds(), "this_run": time.perf_counter() - began}
    results["seconds"] = {name: round(value, 1) for name, value in seconds.items()}
    results |= {"hardware": hardware(device), "commit": git_commit(), "command": command_line()}
    files = write_report(evaluation, results, metrics_dir)
    evaluation.parts.clear()
    log(config, folder, results, files)
    print(Path(files["table"]).read_text())  # on stderr: see run_tool
    return summary(results) | {"files": files}


def log(config, folder, results, files):
    """Log a finished evaluation as a run of W&B or trackio: ``evaluation/PROTOCOL/METRIC`` and its pictures."""
    from latentcast.evaluation.results import mean_of_samples
    from latentcast.training.trackers import tracked

    name, shown = results["protocol"]["name"], ("protocol", "model", "detector", "settings", "seed", "version")
    settings = {key: results[key] for key in (*shown, "hardware", "commit", "seconds")}
    settings["data"] = {key: value for key, value in results["data"].items() if key != "describe"}
    found = {"": results["metrics"], **{f"{who}/": metrics for who, metrics in results["baselines"].items()}}
    found["mean_of_samples/"] = mean_of_samples(results["metrics"])
    with tracked(config, config.run_dir, "evaluation", settings, name=name) as run:
        for part in ("tokenizer", "prior"):
            if (folder / part).is_dir():
                run.uses(part, folder / part)
        figures = {
            f"evaluation/{name}/{who}{metric}": entry["mean"]
            for who, metrics in found.items()
            for metric, entry in metrics.items()
        }
        run.log(figures, 1)
        media = {f"media/{key}": Path(path) for key, path in files.items() if Path(path).suffix in (".png", ".mp4")}
        run.log_files(media, 1, f"{results['model']['name']} under {name}")
        run.makes("evaluation", files["figures"], files["table"])


def choose(args):
    """-> (config, folder of the pipeline)"""
    from latentcast.config import load_config, load_pipeline_config

    experiments = [argument for argument in args.arguments if "=" not in argument]
    overrides = [argument for argument in args.arguments if "=" in argument]
    if args.pipeline is None:
        if len(experiments) != 1:
            raise UserError(f"expected one EXPERIMENT (or --pipeline DIR --data NAME), found {len(experiments)}")
        if args.data:
            overrides.append(f"data={args.data}")
        config = load_config(experiments[0], overrides, tool="evaluate", go_on=True)
        return config, Path(config.run_dir) / "pipeline"
    if experiments or not args.data:
        raise UserError("--pipeline DIR goes with --data NAME and without an EXPERIMENT")
    return load_pipeline_config(args.pipeline, args.data, overrides), Path(args.pipeline)


def label_of(folder):
    """What to call a pipeline: its run's folder, and the pipeline's own name where it is another than "pipeline"."""
    folder = Path(os.path.abspath(folder))
    return folder.parent.name if folder.name == "pipeline" else f"{folder.parent.name}/{folder.name}"


def summary(results):
    """The means alone: of each clip's best sample where there are several, and of all samples."""
    from latentcast.evaluation.results import mean_of_samples

    def means(found):
        return {name: entry["mean"] for name, entry in found.items()}

    return {
        "protocol": results["protocol"]["name"],
        "metrics": means(results["metrics"]),
        "mean_of_samples": means(mean_of_samples(results["metrics"])),
        "baselines": {who: means(found) for who, found in results["baselines"].items()},
    }


if __name__ == "__main__":
    run_tool(main, make_parser())
