"""From nothing to predicted futures in minutes: trains configs/experiment/quickstart.yaml and judges the result.

The same as ``train_tokenizer.py``, ``encode_dataset.py`` and ``train_prior.py`` with the argument ``quickstart``, and
then four futures for each of 32 held-out clips.
"""

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path

from latentcast.cli import run_tool

TOOLS = Path(__file__).resolve().parent
EXPERIMENT = "quickstart"
N_CLIPS, N_SAMPLES, N_SHOWN = 32, 4, 6


def main(args):
    started = time.perf_counter()
    seconds = {}
    for tool in ("train_tokenizer", "encode_dataset", "train_prior"):
        began = time.perf_counter()
        step = [sys.executable, str(TOOLS / f"{tool}.py"), EXPERIMENT, *args.overrides]
        if subprocess.run(step, stdout=sys.stderr).returncode:
            raise RuntimeError(f"{tool} failed; its error stands above")
        seconds[tool] = round(time.perf_counter() - began, 1)
    began = time.perf_counter()
    figures, files = judge(args.overrides)
    seconds["sample_and_judge"] = round(time.perf_counter() - began, 1)
    seconds["total"] = round(time.perf_counter() - started, 1)
    return figures | {"seconds": seconds, "files": files}


def judge(overrides):
    """Predict held-out clips with the saved pipeline; write figures and pictures into ``run_dir``."""
    import torch

    from latentcast import VideoPredictionPipeline
    from latentcast.config import instantiate, load_config, to_container
    from latentcast.data.pictures import contact_sheet
    from latentcast.data.video_writer import write_image, write_video
    from latentcast.metrics import psnr, ssim
    from latentcast.metrics.baselines import BASELINES

    config = load_config(EXPERIMENT, overrides, tool="train_prior")
    run_dir = Path(config.run_dir)
    test_set = instantiate(config.data)(split="test")
    clips = torch.stack([test_set[index]["frames"] for index in range(N_CLIPS)])
    context, future = clips[:, : config.n_context], clips[:, config.n_context :]
    n_frames = future.shape[1]

    pipe = VideoPredictionPipeline.from_pretrained(run_dir / "pipeline")
    sampler = to_container(config.preview.sampler)
    generator = torch.Generator().manual_seed(config.seed)
    samples = pipe(context, n_frames, num_samples=N_SAMPLES, generator=generator, **sampler).frames
    with torch.no_grad():
        reconstruction = pipe.tokenizer.decode(pipe.tokenizer.encode(clips).latents)

    metrics = {"psnr": psnr, "ssim": ssim}
    # Best of N: for each clip and metric, the sample that scores best over the predicted frames.
    scores = {
        name: torch.stack([metric(sample, future).mean(1) for sample in samples.unbind(1)], 1)
        for name, metric in metrics.items()
    }
    figures = {
        "model": {name: score.max(1).values.mean().item() for name, score in scores.items()},
        "model_mean_of_samples": {name: score.mean().item() for name, score in scores.items()},
    }
    predictions = {name: baseline(context, n_frames) for name, baseline in BASELINES.items()}
    predictions["reconstruction"] = reconstruction[:, config.n_context :]
    for name, prediction in predictions.items():
        figures[name] = {key: metric(prediction, future).mean().item() for key, metric in metrics.items()}
    figures = {name: {key: round(value, 4) for key, value in row.items()} for name, row in figures.items()}
    protocol = {
        "clips": N_CLIPS,
        "split": "test",
        "context_frames": config.n_context,
        "predicted_frames": n_frames,
        "samples": N_SAMPLES,
        "best_of": "mean over the predicted frames of a clip, for each metric by itself",
        "sampler": sampler,
    }
    result = run_dir / "metrics" / "quickstart.json"
    result.write_text(json.dumps(figures | {"protocol": protocol}, indent=2))

    files = {name: run_dir / "samples" / f"futures.{name}" for name in ("gif", "mp4", "png")}
    best = scores["psnr"].argsort(1, descending=True)
    ordered = samples[torch.arange(N_CLIPS)[:, None], best]
    shown = torch.cat([future[:, None], ordered], 1)  # truth, then samples from best to worst
    shown = torch.cat([context[:, None].expand(-1, 1 + N_SAMPLES, -1, -1, -1, -1), shown], 2)[:N_SHOWN]
    video = torch.stack([contact_sheet(frames, scale=2) for frames in shown.permute(2, 1, 0, 3, 4, 5)])
    for name in ("gif", "mp4"):
        write_video(files[name], video, fps=5)
    write_image(files["png"], contact_sheet(shown[:, :2].flatten(0, 1)))
    reconstructions = run_dir / "samples" / "reconstructions.png"
    pairs = torch.stack([clips[:16, 0], reconstruction[:16, 0]], 1)  # (16, 2, C, H, W)
    write_image(reconstructions, contact_sheet(torch.cat([pairs[:8].transpose(0, 1), pairs[8:].transpose(0, 1)]), 2))
    return figures, {"figures": str(result), "reconstructions": str(reconstructions)} | {
        name: str(path) for name, path in files.items()
    }


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="e.g. run_dir=runs/again")
    run_tool(main, parser)
