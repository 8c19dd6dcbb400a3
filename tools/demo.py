"""Predict the example clips that a pipeline was exported with, and write the futures as GIF and picture."""

import argparse
import time
from pathlib import Path

from latentcast.cli import run_tool

N_SHOWN = 6


def main(args):
    import torch

    from latentcast import VideoPredictionPipeline
    from latentcast.data.pictures import contact_sheet
    from latentcast.data.video_writer import write_image, write_video
    from latentcast.zoo import read_examples

    began = time.perf_counter()
    pipe = VideoPredictionPipeline.from_pretrained(args.pipeline)
    clips = read_examples(args.pipeline)[:N_SHOWN]
    n_context = pipe.config.n_context
    context, future = clips[:, :n_context], clips[:, n_context:]
    generator = torch.Generator().manual_seed(args.seed)
    samples = pipe(context, future.shape[1], num_samples=args.num_samples, generator=generator).frames
    given = context[:, None].expand(-1, args.num_samples, -1, -1, -1, -1)
    shown = torch.cat(
        [clips[:, None], torch.cat([given, samples], 2)], 1
    )  # a column a clip: the truth, then the futures
    files = {name: Path(args.output) / f"demo.{name}" for name in ("gif", "png")}
    sheets = [contact_sheet(frames, args.scale) for frames in shown.permute(2, 1, 0, 3, 4, 5)]
    write_video(files["gif"], torch.stack(sheets), fps=5)
    write_image(files["png"], contact_sheet(shown[0], args.scale))
    files = {name: str(path) for name, path in files.items()}
    return {"files": files, "seconds": round(time.perf_counter() - began, 1)}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pipeline", required=True, metavar="DIR", help="a pipeline with example clips")
    parser.add_argument("--output", default="demo", metavar="DIR", help="where the pictures go (default: demo)")
    parser.add_argument("--num-samples", type=int, default=4, metavar="N", help="futures of each clip")
    parser.add_argument("--scale", type=int, default=3, metavar="N", help="enlarges the pixels (default: 3)")
    parser.add_argument("--seed", type=int, default=0)
    run_tool(main, parser)
