"""Train a frame tokenizer, the first stage, and save it in ``run_dir/tokenizer``.

With ``tokenizer=PATH``: go on with the weights of one that is trained already.
"""

from latentcast.cli import UserError, experiment_parser, run_tool, train_stage
from latentcast.command import named


def make_parser():
    return experiment_parser(__doc__)


def main(args):
    return train_stage(args, "tokenizer", train)


def train(config, run):
    from itertools import islice

    from latentcast.config import instantiate, to_container
    from latentcast.modeling import load_model
    from latentcast.saved import tokenizer_folder
    from latentcast.training.callbacks import CodebookMonitor, ReconstructionPreview
    from latentcast.training.run import open_videos, preview_clips
    from latentcast.training.tokenizer_module import TokenizerModule

    inputs = []
    if config.tokenizer_dir is None:
        tokenizer = instantiate(config.tokenizer)
    else:
        inputs.append(("tokenizer", tokenizer_folder(config.tokenizer_dir)))
        tokenizer = load_model(inputs[0][1]).train()
    if next(tokenizer.parameters(), None) is None:
        raise UserError(f"{type(tokenizer).__name__} has nothing to learn; go on with {named('train_prior')}")
    data = open_videos(config)
    shown = preview_clips(data, config.preview.n_clips)
    names = to_container(config.preview.figures)
    callbacks = [ReconstructionPreview(shown, run.preview_dir, config.preview.every_n_steps, names)]
    if tokenizer.is_discrete:
        callbacks.append(CodebookMonitor(tokenizer.latent_spec["codebook_sizes"]))
    module = TokenizerModule(
        tokenizer, instantiate(config.optimizer), to_container(config.lr_scheduler), config=to_container(config)
    )
    figures = run.fit(module, data, callbacks, inputs)
    if module.trainer.is_global_zero:
        tokenizer.eval().to(module.trainer.strategy.root_device)
        batches = (batch["frames"].to(tokenizer.device) for batch in data.train_dataloader())
        figures["scaling_factor"] = tokenizer.fit_scaling_factor(islice(batches, SCALING_BATCHES))
        run.save(tokenizer)
    return figures | {"tokenizer": str(run.model_dir)}


SCALING_BATCHES = 16  # of the train split, from which the variance of the latents is measured

if __name__ == "__main__":
    run_tool(main, make_parser())
