"""Every kind of model: what follows a checkpoint is, bit for bit, what follows it in the run that was never stopped."""

import shutil
from functools import partial

import pytest
import pytorch_lightning as pl
import torch
from test_latent_cache import Noise
from tiny import TINY_PRIORS, TINY_TOKENIZERS, random_clip, random_frames
from tiny_experiment import assert_same_checkpoints, tiny_config

from latentcast import PriorModule, TokenizerModule, VideoDataModule, instantiate
from latentcast.config import to_container
from latentcast.training.metrics_file import read_metrics
from latentcast.training.run import TrainingRun

KILLED, SAVED, N_MORE = 8, 7, 20  # steps; epochs have five
CONFIG = [
    *(f"trainer.max_steps={SAVED + N_MORE}", f"checkpoint_every_n_steps={SAVED}", "trainer.limit_val_batches=2"),
    *("lr_scheduler.name=cosine", "optimizer.lr=0.003", "batch_size=2"),
]


class Clips(Noise):
    """Clips of what a model takes, by the name that batches have for it."""

    def __init__(self, make, kind, split):
        self.make, self.kind, self.split = make, kind, split
        super().__init__(lengths=[4] * {"train": 11, "val": 5}[split])
        self.split, self.clip_length = split, 4

    def __getitem__(self, index):
        return {self.kind: self.make(index + 100 * self.epoch)[0], "conditions": {}}


class Kill(pl.Callback):
    """Leaves a copy of the run as a ``kill -9`` inside a step would."""

    def __init__(self, run_dir, copy):
        self.run_dir, self.copy = run_dir, copy

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        if trainer.global_step == KILLED:
            shutil.copytree(self.run_dir, self.copy)


def fit(config, stage, name, callbacks=()):
    """-> what ``last.ckpt`` holds, and the rows of the metrics."""
    with TrainingRun.open(config, stage) as run:
        pl.seed_everything(config.seed)
        module, clips = {"tokenizer": tokenizer, "prior": prior}[stage](name, config)
        run.fit(module, VideoDataModule(clips, config.batch_size, config.num_workers, config.seed), callbacks)
    rows = read_metrics(run.run_dir / "metrics" / f"{stage}.csv")
    return torch.load(run.last, weights_only=True), [row for row in rows if not row[1].startswith("throughput")]


def tokenizer(name, config):
    """-> a module that trains it, and clips."""
    model = TINY_TOKENIZERS[name]()
    module = TokenizerModule(model, *settings(config), config=to_container(config))
    return module, partial(Clips, partial(random_frames, model, 1, 4), "frames")


def prior(name, config):
    model = TINY_PRIORS[name]()
    module = PriorModule(model, *settings(config), model.min_context, config=to_container(config))
    kind = "frames" if model.accepts == "pixels" else model.accepts
    return module, partial(Clips, partial(random_clip, model, 1, 4), kind)


def settings(config):
    return instantiate(config.optimizer), to_container(config.lr_scheduler)


PIXELS = ("pixel", "continuous_pixel")  # nothing to train
VARIANTS = {  # of models that are trained in another form
    *("sliced_vqvae", "sliced_fsq", "diffusers_kl", "diffusers_tiny", "video_transformer_spatial"),
    *("video_transformer_spatiotemporal", "st_pixelcnn", "st_pixelcnn_windowed", "masked_transformer_flat"),
    *("svg_lp_vgg", "recurrent_vae_latents", "recurrent_vae_vectors", "residual_diffusion", "ode_diffusion_latents"),
    "flow_transformer_latents",
}
TRAINED = [("tokenizer", name) for name in TINY_TOKENIZERS if name not in (*PIXELS, *VARIANTS)]
TRAINED += [("prior", name) for name in TINY_PRIORS if name not in VARIANTS]


@pytest.mark.filterwarnings("ignore:The dirpath has changed")
@pytest.mark.parametrize("stage, name", TRAINED)
def test_a_killed_run_goes_on_as_if_it_had_not_been_killed(tmp_path, stage, name):
    """Losses, weights, averages, codebooks, the optimiser and every figure; validations lie before and after."""
    expected, rows = fit(tiny_config(tmp_path, *CONFIG), stage, name, [Kill(tmp_path / "run", tmp_path / "killed")])
    resumed = tiny_config(tmp_path, *CONFIG, f"run_dir={tmp_path}/killed", "resume=true")
    found, found_rows = fit(resumed, stage, name)
    assert len([row for row in rows if row[1] == "train/loss"]) == SAVED + N_MORE
    assert found_rows == rows
    assert_same_checkpoints(found, expected)
    assert expected["lr_schedulers"] == found["lr_schedulers"]
