"""Evaluate a pipeline under a protocol: roll it out over test clips, measure, and write tables, plots and pictures.

``evaluate.py EXPERIMENT protocol=NAME [key=value ...]`` takes the experiment's pipeline and data;
``evaluate.py --pipeline DIR --data NAME protocol=NAME [key=value ...]`` any pipeline and data set. Results go to
``run_dir/metrics``, under the protocol's name. Continues what an earlier run left; the finished result of another
evaluation is replaced with ``evaluation.overwrite=true`` alone. Several GPUs: ``torchrun --nproc-per-node N
tools/evaluate.py ...``.
"""

import argparse
import logging
import os
import time
from pathlib import Path

from latentcast.cli import DTYPES, UserError, announce, pick_device, pick_dtype, prepare_run_dir, run_tool, user_path

logger = logging.getLogger("latentcast")


def main(args):
    from latentcast.config import check_data

    began = time.perf_counter()
    config, folder = choose(args)
    if config.protocol is None:
        raise UserError("protocol: choose one by protocol=NAME (see configs/protocol)")
    if config.data is None:
        raise UserError("data: choose a data set by data=NAME")
    if not (folder / "model_index.json").is_file():
        raise UserError(f"{folder}: no pipeline here; run tools/train_prior.py first, or give --pipeline DIR")
    if args.weights is not None and not Path(args.weights).is_dir():
        raise UserError(f"--weights {args.weights}: no such folder")
    check_data(config)
    announce(config)
    from latentcast.config import instantiate, to_container  # torch takes seconds: mistakes in the config show before
    from latentcast.data.shards import difference_of
    from latentcast.distributed import default_device, process_group, rank_and_world, rank_zero_first
    from latentcast.evaluation.comparison import read_result
    from latentcast.evaluation.evaluator import Evaluation, git_commit, hardware
    from latentcast.evaluation.report import write_report
    from latentcast.pipelines.base import VideoPipeline

    protocol = instantiate(config.protocol)
    with process_group():
        device = pick_device(args.device) if args.device else default_device()
        pipe = VideoPipeline.from_pretrained(folder, dtype=pick_dtype(args.dtype, device)).to(device)
        with rank_zero_first():  # a data set may write an index or download when it is built
            dataset = instantiate(config.data, clip_length=protocol.n_frames)(split=protocol.split)
        metrics_dir = prepare_run_dir(config.run_dir) / "metrics"
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
        evaluation.run()
        rank = rank_and_world()[0]
    if rank > 0:  # the group is closed: what follows is rank 0's alone
        return {}
    logger.info("joining %d clips", len(evaluation.clips))
    results = evaluation.finish()
    seconds = {"measuring": evaluation.seconds(), "this_run": time.perf_counter() - began}
    results["seconds"] = {name: round(value, 1) for name, value in seconds.items()}
    results |= {"hardware": hardware(device), "commit": git_commit()}
    files = write_report(evaluation, results, metrics_dir)
    evaluation.clear()
    print(Path(files["table"]).read_text())  # on stderr: see run_tool
    return summary(results) | {"files": files}


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
    from latentcast.evaluation.report import mean_of_samples

    def means(found):
        return {name: entry["mean"] for name, entry in found.items()}

    return {
        "protocol": results["protocol"]["name"],
        "metrics": means(results["metrics"]),
        "mean_of_samples": means(mean_of_samples(results["metrics"])),
        "baselines": {who: means(found) for who, found in results["baselines"].items()},
    }


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument(
        "arguments", nargs="*", metavar="EXPERIMENT key=value", help="e.g. quickstart protocol=one_digit"
    )
    parser.add_argument(
        "--pipeline", metavar="DIR", type=os.path.expanduser, help="what train_prior.py saved, instead of an experiment"
    )
    parser.add_argument("--data", metavar="NAME", help="a data set under configs/data")
    parser.add_argument(
        "--weights", metavar="DIR", type=user_path, help="the metric networks (see tools/fetch_weights.py)"
    )
    parser.add_argument("--device", help="cpu, cuda, cuda:1, ... (default: a GPU where there is one)")
    parser.add_argument(
        "--dtype",
        default="float32",
        choices=DTYPES,
        help="of the pipeline; auto: bfloat16 where the hardware has it",
    )
    run_tool(main, parser)
