"""Predict the example clips that a pipeline was exported with, and write the futures as GIF and picture."""

import argparse
import time
from pathlib import Path

from latentcast.cli import run_tool

N_SHOWN = 6
ZOO = Path(__file__).parents[1] / "zoo"  # of a checkout


def make_parser():
    parser = argparse.ArgumentParser(description=__doc__)
    default = ZOO / "smmnist32-svg-lp"
    there = {"default": default} if default.is_dir() else {"required": True}
    parser.add_argument(
        "--pipeline", metavar="DIR", help="a pipeline with example clips (default: zoo/smmnist32-svg-lp)", **there
    )
    parser.add_argument("--output", default="demo", metavar="DIR", help="where the pictures go (default: demo)")
    parser.add_argument("--num-samples", type=int, default=4, metavar="N", help="futures of each clip")
    parser.add_argument("--scale", type=int, default=3, metavar="N", help="enlarges the pixels (default: 3)")
    parser.add_argument("--seed", type=int, default=0)
    return parser


def main(args):
    import torch

    from latentcast import VideoPredictionPipeline
    from latentcast.data.video.writer import HOLD, write_image, write_video
    from latentcast.figures.sheets import LEGEND, frame_names, labelled_sheet, labelled_videos, rows_of
    from latentcast.zoo import read_examples

    began = time.perf_counter()
    pipe = VideoPredictionPipeline.from_pretrained(args.pipeline)
    clips = read_examples(args.pipeline)[:N_SHOWN]
    n_context = pipe.config.n_context
    context, future = clips[:, :n_context], clips[:, n_context:]
    generator = torch.Generator().manual_seed(args.seed)
    settings = {"num_samples": args.num_samples, "generator": generator, "value_range": (-1, 1)}
    samples = pipe(context, future.shape[1], **settings).frames
    shown = [rows_of(*parts) for parts in zip(context, future, samples)]
    names = frame_names(n_context, future.shape[1])
    cells = [(name, clip[name]) for name in shown[0] for clip in shown]  # a column a clip: the truth, then the futures
    video = labelled_videos(cells, [f"frame {name}" for name in names], args.scale, columns=len(shown))
    files = {name: Path(args.output) / f"demo.{name}" for name in ("gif", "png")}
    write_video(files["gif"], video, fps=5, hold=HOLD)
    write_image(files["png"], labelled_sheet(list(shown[0].items()), names, LEGEND, args.scale))
    files = {name: str(path) for name, path in files.items()}
    return {"files": files, "seconds": round(time.perf_counter() - began, 1)}


if __name__ == "__main__":
    run_tool(main, make_parser())
