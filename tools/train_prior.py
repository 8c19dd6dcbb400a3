"""Train a prior, the second stage, over the cached latents, and save it with its tokenizer in ``run_dir/pipeline``.

With ``joint=true``: go on with prior and decoder together, over the videos themselves.
"""

from latentcast.cli import announce, experiment_parser, run_tool


def make_parser():
    return experiment_parser(__doc__)


def main(args):
    from latentcast.config import check_data, stage_config

    config = stage_config(args.experiment, args.overrides, "prior")
    check_data(config)
    announce(config)
    from latentcast.pairing import check_pair  # which takes seconds: mistakes in the config show before
    from latentcast.training.run import TrainingRun

    check_pair(config, args.experiment, args.overrides)
    with TrainingRun.open(config, "joint" if config.joint else "prior") as run:
        return train(config, run)


def train(config, run):
    from pytorch_lightning import seed_everything

    from latentcast import VideoPredictionPipeline
    from latentcast.config import cache_root, instantiate, to_container
    from latentcast.data.base import conditions_by_name, match_conditions
    from latentcast.data.datamodules import VideoDataModule
    from latentcast.modeling import find_tokenizer
    from latentcast.saved import used_tokenizer
    from latentcast.training.callbacks import CollapseMonitor, PredictionPreview
    from latentcast.training.joint import JointModule, start_from
    from latentcast.training.prior_module import PriorModule
    from latentcast.training.run import preview_clips, replacing_folder

    seed_everything(config.seed)
    tokenizer = find_tokenizer(config, run.run_dir).requires_grad_(False)
    over_frames = config.joint or tokenizer.latent_spec["kind"] == "pixels"
    videos = VideoDataModule(
        instantiate(config.data), config.batch_size, config.num_workers, config.seed, config.read_timeout
    )
    told = conditions_by_name(config.conditions, videos.train_set)
    prior = instantiate(config.prior, latent_spec=tokenizer.latent_spec, **({"conditions": told} if told else {}))
    prior.check_context(config.n_context, config.clip_length)
    shown = preview_clips(videos, config.preview.n_clips)
    data = videos if over_frames else open_cache(config, tokenizer, prior, videos)
    match_conditions(prior.conditions, type(prior).__name__, data.train_set.conditions, "the data set")
    sampler, crop = to_container(config.preview.sampler), videos.train_set.crop

    def make_pipeline(prior):
        used = None if prior.accepts == "pixels" else tokenizer
        return VideoPredictionPipeline(prior, used, n_context=config.n_context, fps=shown.fps, crop=crop)

    # Predict one frame now: a mistake in preview.sampler must not wait for the first preview.
    trial = make_pipeline(prior)
    trial.set_progress_bar_config(disable=True)
    settings = {"num_samples": config.preview.num_samples, "value_range": (-1, 1)}
    trial(shown.frames[:1, : config.n_context], n_frames=1, **settings, **sampler)
    preview = PredictionPreview(
        shown,
        run.preview_dir,
        config.preview.every_n_steps,
        make_pipeline,
        config.n_context,
        config.preview.num_samples,
        sampler,
        config.seed,
        to_container(config.preview.figures),
    )
    settings = {
        "optimizer": instantiate(config.optimizer),
        "lr_scheduler": to_container(config.lr_scheduler),
        "n_context": config.n_context,
        "config": to_container(config),
    }
    trained = used_tokenizer(run.run_dir, config.tokenizer_dir)
    inputs = [("tokenizer", trained)] if over_frames and trained else []
    if not over_frames:
        inputs.append(("latents", cache_root(config)))
    elif config.joint and (run.run_dir / "prior").is_dir():
        inputs.append(("prior", run.run_dir / "prior"))
    if config.joint:
        if run.checkpoint is None:
            start_from(prior, run.run_dir / "prior")
        module = JointModule(prior, tokenizer, **settings, **to_container(config.joint_training))
    else:
        module = PriorModule(prior, **settings, tokenizer=tokenizer)
    figures = run.fit(module, data, [preview, CollapseMonitor()], inputs)
    pipeline_dir = run.run_dir / "pipeline"
    if module.trainer.is_global_zero:
        pipeline = make_pipeline(prior.eval())
        run.save(pipeline if config.joint else prior)
        with replacing_folder(pipeline_dir) as folder:
            pipeline.save_pretrained(folder)
    saved = {"prior": run.model_dir, "pipeline": pipeline_dir}
    if config.joint:
        saved |= {part: run.model_dir / part for part in ("prior", "tokenizer")}
    return figures | {name: str(path) for name, path in saved.items()}


def open_cache(config, tokenizer, prior, videos):
    """The latents cache, made sure to be what the tokenizer gives for the experiment's videos."""
    from latentcast.cli import UserError
    from latentcast.command import named
    from latentcast.config import cache_root
    from latentcast.data.datamodules import LatentDataModule
    from latentcast.data.store.latent_cache import SERVING
    from latentcast.modeling import fingerprint

    root = cache_root(config)
    if not (root / "train").is_dir():
        tool = named("encode_dataset")
        raise UserError(f"{root / 'train'}: no latents cache here; run {tool} first, or give one: cache.root=PATH")
    expect = {"tokenizer_fingerprint": fingerprint(tokenizer), "latent_spec": tokenizer.latent_spec}
    data = LatentDataModule(
        root,
        config.clip_length,
        config.batch_size,
        num_workers=config.num_workers,
        seed=config.seed,
        sample_posterior=config.cache.sample_posterior,
        expect=expect,
        read_timeout=config.read_timeout,
        has_val=videos.val_set is not None,
    )
    for cached, source in ((data.train_set, videos.train_set), (data.val_set, videos.val_set)):
        if cached is not None and source is not None:
            cached.expect(data=source.describe())
            if cached.manifest["store"] not in SERVING[prior.accepts]:
                raise UserError(
                    f"{cached.root}: it holds {cached.space}, and {type(prior).__name__} takes "
                    f"{prior.accepts}; encode again with cache.overwrite=true, or elsewhere by cache.root=PATH"
                )
    return data


if __name__ == "__main__":
    run_tool(main, make_parser())
