"""Pictures that show how a prior makes its frames, for these pages.

    python docs/results/figures.py layers --pipeline DIR --data NAME --output FILE.png [--clip 0] [key=value ...]

layers      a hierarchical tokenizer's prediction, decoded from its first layer, its first two, and so on
residual    Residual Video Diffusion frame by frame: mu, the residual (grey is none), their sum
half_steps  a prior over continuous time at half frame steps, the truth above the whole ones

Time runs to the right, and the first row is the truth. ``key=value`` are options of the prior's sampler,
``data.key=value`` of the data set.
"""

import argparse

import torch

from latentcast.cli import parse_options
from latentcast.config import instantiate, load_pipeline_config
from latentcast.data.pictures import contact_sheet
from latentcast.data.video_writer import write_image
from latentcast.pipelines.base import VideoPipeline

SEED = 0


def layers(pipe, context, truth, sampler):
    codes = pipe.prior.sample(pipe.encode(context), len(truth), generator=seeded(), **sampler)[:, 0]
    n_layers = codes.shape[-1]
    return [truth, *(pipe.tokenizer.decode(codes, n_layers=n)[0] for n in range(1, n_layers + 1))]


def residual(pipe, context, truth, sampler):
    prior, mus = pipe.prior, []
    predict_frame = prior.predict_frame

    def watched(memory):
        mu, sigma = predict_frame(memory)
        mus.append(mu)
        return mu, sigma

    prior.predict_frame = watched
    future = prior.sample(pipe.encode(context), len(truth), generator=seeded(), **sampler)[0, 0]
    mu = torch.cat(mus)
    return [truth, mu, future - mu, future]


def half_steps(pipe, context, truth, sampler):
    future = pipe(context, 2 * len(truth), fps_multiplier=2, generator=seeded(), **sampler).frames[0, 0]
    known = torch.ones_like(future)
    known[1::2] = truth
    return [known, future]


def seeded():
    return torch.Generator().manual_seed(SEED)


@torch.no_grad()
def main(figure, pipeline, data, output, clip, n_frames, contrast, overrides):
    pipe = VideoPipeline.from_pretrained(pipeline)
    pipe.prior.eval()
    n_context = pipe.config.n_context
    of_data = [override for override in overrides if override.startswith("data.")]
    config = load_pipeline_config(pipeline, data, of_data, clip_length=n_context + n_frames)
    frames = instantiate(config.data)(split="test")[clip]["frames"]
    sampler = parse_options([override for override in overrides if override not in of_data])
    rows = figure(pipe, frames[None, :n_context], frames[n_context:], sampler)
    write_image(output, contact_sheet((torch.stack(rows) * contrast).clamp(-1, 1)))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("figure", choices=["layers", "residual", "half_steps"])
    parser.add_argument("options", nargs="*", metavar="key=value")
    parser.add_argument("--pipeline", required=True, metavar="DIR")
    parser.add_argument("--data", required=True, metavar="NAME", help="a data set under configs/data; its test split")
    parser.add_argument("--output", required=True, metavar="FILE.png")
    parser.add_argument("--clip", type=int, default=0, help="number of the test clip")
    parser.add_argument("--n-frames", type=int, default=10, help="true frames after the context (default: 10)")
    parser.add_argument("--contrast", type=float, default=1.0, help="factor on all values, of which 0 is grey")
    args = parser.parse_intermixed_args()
    figure = globals()[args.figure]
    main(figure, args.pipeline, args.data, args.output, args.clip, args.n_frames, args.contrast, args.options)
