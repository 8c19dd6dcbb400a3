"""From nothing to predicted futures in minutes: trains configs/experiment/quickstart.yaml and judges the result.

The same as ``train_tokenizer.py``, ``encode_dataset.py``, ``train_prior.py`` and ``evaluate.py`` with the argument
``quickstart``, and then pictures of four futures for each of six held-out clips.
"""

import argparse
import subprocess
import sys
import time
from pathlib import Path

from latentcast.cli import run_tool

TOOLS = Path(__file__).resolve().parent
EXPERIMENT = "quickstart"
N_SHOWN, N_SAMPLES = 6, 4


def main(args):
    started = time.perf_counter()
    seconds = {}
    for tool in ("train_tokenizer", "encode_dataset", "train_prior", "evaluate"):
        began = time.perf_counter()
        step = [sys.executable, str(TOOLS / f"{tool}.py"), EXPERIMENT, *args.overrides]
        if subprocess.run(step, stdout=sys.stderr).returncode:
            raise RuntimeError(f"{tool} failed; its error stands above")
        seconds[tool] = round(time.perf_counter() - began, 1)
    figures, files = show(args.overrides)
    seconds["total"] = round(time.perf_counter() - started, 1)
    return figures | {"seconds": seconds, "files": files}


def show(overrides):
    """Write the evaluation's figures in short, and pictures; -> figures, name -> file"""
    import torch

    from latentcast import VideoPredictionPipeline
    from latentcast.config import instantiate, load_config, to_container
    from latentcast.data.pictures import contact_sheet
    from latentcast.data.video_writer import write_image, write_video
    from latentcast.evaluation.comparison import read_result
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
        **to_container(config.preview.sampler),
    ).frames
    quality = torch.stack([psnr(sample, future).mean(1) for sample in samples.unbind(1)], 1)
    ordered = samples[torch.arange(N_SHOWN)[:, None], quality.argsort(1, descending=True)]
    shown = torch.cat([future[:, None], ordered], 1)  # truth, then samples from best to worst
    shown = torch.cat([context[:, None].expand(-1, 1 + N_SAMPLES, -1, -1, -1, -1), shown], 2)
    video = torch.stack([contact_sheet(frames, scale=2) for frames in shown.permute(2, 1, 0, 3, 4, 5)])
    files = {name: run_dir / "samples" / f"futures.{name}" for name in ("gif", "mp4", "png")}
    for name in ("gif", "mp4"):
        write_video(files[name], video, fps=5)
    write_image(files["png"], contact_sheet(shown[:, :2].flatten(0, 1)))
    with torch.no_grad():
        reconstruction = pipe.tokenizer.decode(pipe.tokenizer.encode(clips).latents)
    files["reconstructions"] = run_dir / "samples" / "reconstructions.png"
    pairs = torch.stack([clips[:, 0], reconstruction[:, 0]], 1)  # (16, 2, C, H, W)
    sheet = torch.cat([pairs[:8].transpose(0, 1), pairs[8:].transpose(0, 1)])
    write_image(files["reconstructions"], contact_sheet(sheet, 2))
    return figures, {name: str(path) for name, path in {"figures": result, **files}.items()}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="e.g. run_dir=runs/again")
    run_tool(main, parser)
