"""From nothing to predicted futures in minutes: trains the experiment quickstart and judges the result.

The same as the tools train_tokenizer, encode_dataset, train_prior and evaluate with the argument ``quickstart``, then
pictures of four futures for each of six held-out clips, and a report of it all: ``run_dir/report.html``.
"""

import argparse
import subprocess
import sys
import time
from pathlib import Path

from latentcast.cli import run_tool
from latentcast.command import process_of

EXPERIMENT = "quickstart"
N_SHOWN, N_SAMPLES = 6, 4


def make_parser():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="e.g. run_dir=runs/again")
    return parser


def main(args):
    started = time.perf_counter()
    seconds = {}
    for tool in ("train_tokenizer", "encode_dataset", "train_prior", "evaluate"):
        began = time.perf_counter()
        step = [*process_of(tool), EXPERIMENT, *args.overrides]
        if subprocess.run(step, stdout=sys.stderr).returncode:
            raise RuntimeError(f"{tool} failed; its error stands above")
        seconds[tool] = round(time.perf_counter() - began, 1)
    figures, files = show(args.overrides)
    from latentcast.reporting.folder import read_run
    from latentcast.reporting.page import write_page

    files["report"] = str(Path(files["figures"]).parents[1] / "report.html")
    write_page([read_run(Path(files["report"]).parent)], Path(files["report"]))
    print(f"open {files['report']} in a browser to see it all")  # on stderr: see run_tool
    seconds["total"] = round(time.perf_counter() - started, 1)
    return figures | {"seconds": seconds, "files": files}


def show(overrides):
    """Write the evaluation's figures in short, and pictures; -> figures, name -> file"""
    import torch

    from latentcast import VideoPredictionPipeline
    from latentcast.config import instantiate, load_config, to_container
    from latentcast.data.video.writer import write_both, write_image
    from latentcast.evaluation.results import read_result
    from latentcast.figures.sheets import LEGEND, frame_names, labelled_sheet, labelled_videos, rows_of, scale_for
    from latentcast.files import write_json
    from latentcast.metrics import psnr

    config = load_config(EXPERIMENT, overrides, tool="evaluate", go_on=True)
    run_dir = Path(config.run_dir)
    results = read_result(run_dir / "metrics" / f"{config.protocol.name}.json")
    metrics = results["metrics"]
    by_sample = {name: entry["mean_of_samples"] for name, entry in metrics.items() if "mean_of_samples" in entry}
    rows = {"model": metrics, "model_mean_of_samples": by_sample, **results["baselines"]}
    figures = {who: {name: round(entry["mean"], 4) for name, entry in row.items()} for who, row in rows.items()}
    result = run_dir / "metrics" / "quickstart.json"
    write_json(result, figures | {"protocol": results["protocol"], "sampler": results["model"]["sampler"]})

    n_context = config.protocol.n_context
    test_set = instantiate(config.data)(split="test")
    clips = torch.stack([test_set[index]["frames"] for index in range(16)])
    context, future = clips[:N_SHOWN, :n_context], clips[:N_SHOWN, n_context:]
    pipe = VideoPredictionPipeline.from_pretrained(run_dir / "pipeline")
    samples = pipe(
        context,
        future.shape[1],
        num_samples=N_SAMPLES,
        generator=torch.Generator().manual_seed(config.seed),
        value_range=(-1, 1),
        **to_container(config.preview.sampler),
    ).frames
    quality = torch.stack([psnr(sample, future).mean(1) for sample in samples.unbind(1)], 1)
    ordered = samples[torch.arange(N_SHOWN)[:, None], quality.argsort(1, descending=True)]
    shown = [rows_of(*parts) for parts in zip(context, future, ordered)]
    ranks = ["truth", "best sample", *(f"sample {rank}" for rank in range(2, 1 + N_SAMPLES))]
    scale, names = scale_for(future.shape[-2], 64), frame_names(n_context, future.shape[1])
    cells = [(rank, clip) for rank, row in zip(ranks, zip(*(clip.values() for clip in shown))) for clip in row]
    video = labelled_videos(cells, [f"frame {name}" for name in names], scale, columns=N_SHOWN)
    files = dict(zip(("mp4", "gif"), write_both(run_dir / "samples" / "futures", video, fps=5)))
    files["png"] = run_dir / "samples" / "futures.png"
    rows = [
        (f"clip {n}\n{rank}", clip) for n, row in enumerate(shown, 1) for rank, clip in zip(ranks[:2], row.values())
    ]
    write_image(files["png"], labelled_sheet(rows, names, LEGEND, scale))
    with torch.no_grad():
        reconstruction = pipe.tokenizer.decode(pipe.tokenizer.encode(clips).latents)
    files["reconstructions"] = run_dir / "samples" / "reconstructions.png"
    pairs = [(name, frames[:, 0]) for name, frames in (("truth", clips), ("reconstruction", reconstruction))]
    sheet = [(name, frames[half]) for half in (slice(8), slice(8, 16)) for name, frames in pairs]
    write_image(files["reconstructions"], labelled_sheet(sheet, title="first frames of test clips", scale=scale))
    return figures, {name: str(path) for name, path in {"figures": result, **files}.items()}


if __name__ == "__main__":
    run_tool(main, make_parser())
