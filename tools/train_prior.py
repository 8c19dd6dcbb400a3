"""Train a prior, the second stage, over the cached latents, and save it with its tokenizer in ``run_dir/pipeline``.

With ``joint=true``: go on with prior and decoder together, over the videos themselves.
"""

from functools import partial

from latentcast.cli import experiment_parser, run_tool, train_stage


def make_parser():
    return experiment_parser(__doc__)


def main(args):
    return train_stage(args, "prior", train)


def train(config, run):
    from latentcast import VideoPredictionPipeline
    from latentcast.config import to_container
    from latentcast.modeling import find_tokenizer
    from latentcast.training.callbacks import CollapseMonitor, PredictionPreview
    from latentcast.training.run import open_videos, preview_clips
    from latentcast.training.stage_two import make_module, make_prior, open_data, save, used_by

    tokenizer = find_tokenizer(config, run.run_dir).requires_grad_(False)
    videos = open_videos(config)
    prior = make_prior(config, tokenizer, videos)
    shown = preview_clips(videos, config.preview.n_clips)
    data = open_data(config, tokenizer, prior, videos)
    used = None if prior.accepts == "pixels" else tokenizer
    told = {"n_context": config.n_context, "fps": shown.fps, "crop": videos.train_set.crop}
    make_pipeline = partial(VideoPredictionPipeline, tokenizer=used, **told)
    asked = to_container(config.preview)
    samples = {name: asked[name] for name in ("every_n_steps", "num_samples", "sampler")}
    samples |= {"n_context": config.n_context, "seed": config.seed}
    preview = PredictionPreview(shown, run.preview_dir, make_pipeline=make_pipeline, names=asked["figures"], **samples)
    preview.try_out(prior)
    module = make_module(config, tokenizer, prior, run)
    figures = run.fit(module, data, [preview, CollapseMonitor()], used_by(config, run, over_frames=data is videos))
    return figures | save(run, module, prior, make_pipeline)


if __name__ == "__main__":
    run_tool(main, make_parser())
