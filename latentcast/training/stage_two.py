"""The steps of stage two, as tools/train_prior.py puts them together; with ``joint``, which trains the decoder too."""

from latentcast.cli import UserError
from latentcast.command import named
from latentcast.config import cache_root, instantiate, to_container
from latentcast.data.base import conditions_by_name, match_conditions
from latentcast.data.datamodules import LatentDataModule
from latentcast.data.store.latent_cache import SERVING
from latentcast.modeling import fingerprint
from latentcast.saved import used_tokenizer

from .joint import JointModule, start_from
from .prior_module import PriorModule
from .run import loading, replacing_folder


def make_prior(config, tokenizer, videos):
    """The experiment's prior over the tokenizer's latents, to be told what it names of the videos' conditions."""
    told = conditions_by_name(config.conditions, videos.train_set)
    prior = instantiate(config.prior, latent_spec=tokenizer.latent_spec, **({"conditions": told} if told else {}))
    prior.check_context(config.n_context, config.clip_length)
    return prior


def open_data(config, tokenizer, prior, videos):
    """What the prior learns from: the latents cache, or the videos themselves where pixels are latents or the decoder
    learns, too."""
    over_frames = config.joint or tokenizer.latent_spec["kind"] == "pixels"
    data = videos if over_frames else open_cache(config, tokenizer, prior, videos)
    match_conditions(prior.conditions, type(prior).__name__, data.train_set.conditions, "the data set")
    return data


def open_cache(config, tokenizer, prior, videos):
    """The latents cache, made sure to be what the tokenizer gives for the experiment's videos."""
    root = cache_root(config)
    if not (root / "train").is_dir():
        tool = named("encode_dataset")
        raise UserError(f"{root / 'train'}: no latents cache here; run {tool} first, or give one: cache.root=PATH")
    expect = {"tokenizer_fingerprint": fingerprint(tokenizer), "latent_spec": tokenizer.latent_spec}
    options = {"sample_posterior": config.cache.sample_posterior, "has_val": videos.val_set is not None}
    data = LatentDataModule(root, config.clip_length, expect=expect, **options, **loading(config))
    for cached, source in ((data.train_set, videos.train_set), (data.val_set, videos.val_set)):
        if cached is not None and source is not None:
            cached.expect(data=source.describe())
            if cached.manifest["store"] not in SERVING[prior.accepts]:
                raise UserError(
                    f"{cached.root}: it holds {cached.space}, and {type(prior).__name__} takes "
                    f"{prior.accepts}; encode again with cache.overwrite=true, or elsewhere by cache.root=PATH"
                )
    return data


def make_module(config, tokenizer, prior, run):
    """The module that trains the prior, or both; a new joint training starts with the run's trained prior."""
    settings = {
        "tokenizer": tokenizer,
        "optimizer": instantiate(config.optimizer),
        "lr_scheduler": to_container(config.lr_scheduler),
        "n_context": config.n_context,
        "config": to_container(config),
    }
    if not config.joint:
        return PriorModule(prior, **settings)
    if run.checkpoint is None:
        start_from(prior, run.run_dir / "prior")
    return JointModule(prior, **settings, **to_container(config.joint_training))


def used_by(config, run, over_frames):
    """What the training goes on from, see ``TrainingRun.fit``: (kind, folder)."""
    if not over_frames:
        return [("latents", cache_root(config))]
    found = {"tokenizer": used_tokenizer(run.run_dir, config.tokenizer_dir)}
    if config.joint and (run.run_dir / "prior").is_dir():
        found["prior"] = run.run_dir / "prior"
    return [(kind, folder) for kind, folder in found.items() if folder]


def save(run, module, prior, make_pipeline):
    """Write the prior, or of joint training the pipeline, and ``run_dir/pipeline`` -> what -> its folder."""
    saved, joint = {"prior": run.model_dir, "pipeline": run.run_dir / "pipeline"}, run.stage == "joint"
    if module.trainer.is_global_zero:
        pipeline = make_pipeline(prior.eval())
        run.save(pipeline if joint else prior)
        with replacing_folder(saved["pipeline"]) as folder:
            pipeline.save_pretrained(folder)
    if joint:
        saved |= {part: run.model_dir / part for part in ("prior", "tokenizer")}
    return {name: str(path) for name, path in saved.items()}
