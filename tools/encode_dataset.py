"""Encode a data set, between the stages, with the trained tokenizer into ``run_dir/latents/{train,val,test}``.

What is stored follows from the experiment's prior, unless ``cache.store`` says it.

Continues what an earlier run left. Several GPUs: ``torchrun --nproc-per-node N tools/encode_dataset.py EXPERIMENT``, or
``torchrun --nproc-per-node N -m latentcast encode-dataset EXPERIMENT``. Several machines: ``--shards I/N``, the I-th of
N processes that start whenever they do, or ``--engine ray``; see docs/scaling.md.
"""

import logging

from latentcast.cli import UserError, announce, experiment_parser, prepare_run_dir, run_tool
from latentcast.command import named
from latentcast.shares import add_sharing, by_ray, is_for_ray, share_of

logger = logging.getLogger("latentcast")


def make_parser():
    parser = experiment_parser(__doc__.partition("\n")[0])
    add_sharing(parser)
    parser.add_argument("--verify", action="store_true", help="compare the finished cache with its checksums, and end")
    return parser


def main(args):
    from latentcast.config import cache_root, check_data, load_config

    config = load_config(args.experiment, args.overrides, tool="encode_dataset", go_on=True)
    check_data(config)
    announce(config)
    from latentcast.data.base import conditions_by_name  # which takes seconds: mistakes in the config show before
    from latentcast.data.store.encoding import encode_dataset
    from latentcast.data.store.latent_cache import choose_store
    from latentcast.distributed import process_group, rank_and_world, rank_zero_first
    from latentcast.modeling import find_tokenizer
    from latentcast.pairing import check_pair, plan_prior
    from latentcast.training.trackers import open_tracker

    if args.verify:
        return verify(config)
    share = share_of(args, config.cache.overwrite)
    check_pair(config, args.experiment, args.overrides)
    if is_for_ray(args):
        return by_ray(main, args)
    run_dir = prepare_run_dir(config.run_dir)
    tokenizer = find_tokenizer(config, run_dir)
    spec = tokenizer.latent_spec
    prior = None if config.prior is None else plan_prior(config, tokenizer)
    if spec["kind"] == "pixels":
        logger.warning(
            "%s: %s takes pixels from the videos and needs no cache", type(tokenizer).__name__, named("train_prior")
        )
    not_its = ("root", "splits", "sample_posterior")
    options = {name: value for name, value in config.cache.items() if name not in not_its}
    open_tracker(config, run_dir, "encode")  # refuses an unknown logger, before hours of work
    figures = {}
    with process_group():
        for split in config.cache.splits:
            with rank_zero_first():  # a data set may write an index or download when it is built
                dataset = open_split(config, split)
            if dataset is not None:
                root = cache_root(config) / split
                loading = {"num_workers": config.num_workers, "read_timeout": config.read_timeout}
                conditions_by_name(config.conditions, dataset)  # refuses unknown ones
                if prior is not None and prior.accepts != "pixels":
                    options["store"] = choose_store(config.cache.store, prior, tokenizer, root, config.cache.overwrite)
                figures[split] = encode_dataset(dataset, tokenizer, root, **loading, **options, share=share)
        rank = rank_and_world()[0]
    whole = not any("pending_shards" in found for found in figures.values())
    if rank == 0 and whole and any(found["frames_per_s"] for found in figures.values()):
        log(config, run_dir, figures)
    return {"splits": figures}


def log(config, run_dir, figures):
    """Log what was encoded as a run of W&B or trackio."""
    from latentcast.config import cache_root, to_container
    from latentcast.saved import used_tokenizer
    from latentcast.training.trackers import tracked

    shown = ("name", "run_dir", "frame_size", "channels", "data", "tokenizer_dir", "cache")
    with tracked(config, run_dir, "encode", {key: to_container(config)[key] for key in shown}) as run:
        trained = used_tokenizer(run_dir, config.tokenizer_dir)
        if trained is not None:
            run.uses("tokenizer", trained)
        found = {f"encode/{split}_{name}": value for split, figure in figures.items() for name, value in figure.items()}
        run.log({key: value for key, value in found.items() if value is not None}, 1)
        run.makes("latents", cache_root(config))


def open_split(config, split):
    """The split's VideoDataset; None for an empty val or test split."""
    from latentcast.config import instantiate
    from latentcast.data.base import EmptySplitError

    if config.data is None:
        raise UserError("data: the experiment names none; choose one by data=NAME")
    try:
        return instantiate(config.data)(split=split)
    except EmptySplitError as error:
        if split == "train":
            raise
        logger.warning("%s: nothing to encode: %s", split, error)
        return None


def verify(config):
    """Compare every shard of the splits that are encoded with its checksum."""
    from latentcast.config import cache_root
    from latentcast.data.store.latent_cache import verify_cache

    root = cache_root(config)
    splits = [split for split in config.cache.splits if (root / split).is_dir()]
    if not splits:
        raise UserError(f"{root}: no latents cache here; run {named('encode_dataset')}")
    return {"splits": {split: {"verified_shards": verify_cache(root / split)} for split in splits}}


if __name__ == "__main__":
    run_tool(main, make_parser())
