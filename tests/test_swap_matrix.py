"""Every tokenizer with every prior, by ``tokenizer=X prior=Y`` alone, through all tools; docs/matrix.md says the same."""

import functools
import hashlib
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from tiny_experiment import EXPERIMENT, call_main

from latentcast import VideoPredictionPipeline
from latentcast.config import config_root

TOKENIZERS, PRIORS = (
    sorted(path.stem for path in (config_root() / group).glob("*.yaml")) for group in ("tokenizer", "prior")
)
CODES = {"vqvae", "sliced_vqvae", "hr_vqvae", "residual_vqvae", "fsq", "lfq", "diffusers_vq", "pixel"}
VECTORS = {"dcgan", "vgg"}
CODE_PRIORS = {"video_transformer", "st_pixelcnn"}


def fits(tokenizer, prior):
    return tokenizer in CODES if prior in CODE_PRIORS else not (tokenizer in VECTORS and prior == "sde_diffusion")


CELLS = [(tokenizer, prior) for tokenizer in TOKENIZERS for prior in PRIORS if fits(tokenizer, prior)]

CONVOLUTIONS = {"hidden_channels": 16, "residual_channels": 8, "n_residual_blocks": 1}
VQ = CONVOLUTIONS | {"embedding_dim": 8, "codebook_size": 6}
BLOCKS = {
    "down_block_types": ["DownEncoderBlock2D"] * 2,
    "up_block_types": ["UpDecoderBlock2D"] * 2,
    "block_out_channels": [8, 16],
    "norm_num_groups": 4,
}
LEVELS = ["encoder_block_out_channels", "decoder_block_out_channels", "num_encoder_blocks", "num_decoder_blocks"]
FEW_STEPS = {"preview": {"sampler": {"n_steps": 2}}}
SIZES = {
    "tokenizer": {
        **dict.fromkeys(("vqvae", "hr_vqvae", "residual_vqvae"), VQ),
        "sliced_vqvae": VQ | {"n_codebooks": 2},
        "fsq": CONVOLUTIONS | {"levels": [8, 6, 5]},
        "lfq": CONVOLUTIONS | {"embedding_dim": 4, "n_codebooks": 2},
        "kl_vae": {"block_channels": [8, 16], "norm_groups": 4, "latent_channels": 3},
        **dict.fromkeys(("dcgan", "vgg"), {"embedding_dim": 8, "hidden_channels": 4}),
        "diffusers": {
            "autoencoder": {"_class_name": "AutoencoderTiny", **dict(zip(LEVELS, [[8] * 3] * 2 + [[1] * 3] * 2))}
        },
        "diffusers_kl": {"autoencoder": BLOCKS},
        "diffusers_vq": {"autoencoder": BLOCKS | {"num_vq_embeddings": 12}},
        "pixel": {"levels": 4},
    },
    "prior": {
        "video_transformer": {"dim": 16, "embed_dim": 8, "n_heads": 2, "head_dim": 8, "n_layers": 1},
        "st_pixelcnn": {"dim": 8, "n_blocks": 1, "block_layers": 1, "n_heads": 2, "head_dim": 4},
        "recurrent_vae": {"dim": 8, "hidden_channels": 4, "group_dim": 3, "cells": 12},
        "residual_diffusion": {"width": 16, "denoising_multipliers": [1, 2, 2], "transform_multipliers": [1, 2, 2]},
        "sde_diffusion": {
            "motion_channels": [6, 8, 8, 8],
            "motion_kernels": [3, 3, 3, 3],
            "dt": 0.5,
            "block_channels": [8, 16, 16],
            "n_blocks": 1,
            "head_dim": 8,
            "norm_groups": 4,
        },
    },
}
MATRIX = EXPERIMENT | {
    "defaults": EXPERIMENT["defaults"] | {"prior": "video_transformer", "protocol": "video_folder"},
    "clip_length": 4,
    "n_context": 2,
    "batch_size": 4,
    "data": EXPERIMENT["data"] | {"n_videos": 4, "n_heldout_videos": 1},
    "ema_decay": 0,
    "trainer": EXPERIMENT["trainer"] | {"max_steps": 1},
    "preview": EXPERIMENT["preview"] | {"n_clips": 1, "num_samples": 1, "figures": ["futures"]},
    "train_tokenizer": {"preview": {"figures": ["reconstructions"]}, "trainer": {"max_steps": 2}},
    "protocol": {"n_clips": 1, "n_predicted": 2, "n_samples": 2, "metrics": ["mse"]},
    "evaluation": {"baselines": ["copy_last_frame"]},
    "when": {
        group: {
            name: {group: sizes} | (FEW_STEPS if name.endswith("diffusion") else {}) for name, sizes in sizes_of.items()
        }
        for group, sizes_of in SIZES.items()
    },
}
for group in ("tokenizer", "prior"):
    del MATRIX[group]  # what is said under ``when`` alone


@pytest.fixture(scope="module")
def experiment(tmp_path_factory):
    path = tmp_path_factory.mktemp("matrix") / "matrix.yaml"
    path.write_text(yaml.safe_dump(MATRIX))
    return path


@pytest.fixture(scope="module")
def encoded(experiment):
    """Tokenizer -> the folder of a run that has it, and the cache where one is needed; each is made once."""

    @functools.cache
    def encoded(tokenizer):
        prior = "video_transformer" if tokenizer in CODES else "recurrent_vae"
        run_dir = experiment.parent / tokenizer
        swap = [f"tokenizer={tokenizer}", f"prior={prior}", f"run_dir={run_dir}"]
        if tokenizer != "pixel":  # which has nothing to learn, and is taken from the videos
            assert call_main("train_tokenizer", experiment, *swap)["steps"] == 2
            splits = call_main("encode_dataset", experiment, *swap)["splits"]
            assert splits["train"]["frames"] == 4 * 6
        return run_dir

    return encoded


@pytest.fixture(scope="module")
def trained(experiment, encoded):
    """Tokenizer, prior -> the overrides of a run that has trained both; each is trained once."""

    @functools.cache
    def trained(tokenizer, prior):
        first, run_dir = encoded(tokenizer), experiment.parent / f"{tokenizer}-{prior}"
        run_dir.mkdir()
        for part in ("tokenizer", "latents") if first.is_dir() else ():
            (run_dir / part).symlink_to(first / part)
        swap = [f"tokenizer={tokenizer}", f"prior={prior}", f"run_dir={run_dir}"]
        assert call_main("train_prior", experiment, *swap)["steps"] == 1
        return swap, run_dir / "pipeline"

    return trained


FRESH = """
import sys, json, torch
from test_swap_matrix import futures
print(json.dumps([futures(folder) for folder in sys.argv[1:]]))
"""


def futures(folder):
    """What a saved pipeline predicts of a fixed clip: a checksum."""
    pipe = VideoPredictionPipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    few = {"n_steps": 2} if "n_steps" in pipe.prior.sampler_options() else {}
    frames = torch.rand(1, 2, 1, 16, 16, generator=torch.Generator().manual_seed(1)) * 2 - 1
    found = pipe(frames, n_frames=2, generator=torch.Generator().manual_seed(0), value_range=(-1, 1), **few).frames
    assert found.shape == (1, 1, 2, 1, 16, 16) and found.isfinite().all()
    return hashlib.sha256(found.numpy().tobytes()).hexdigest()


@pytest.mark.parametrize("tokenizer, prior", CELLS)
def test_a_swap_goes_from_training_to_an_evaluation(experiment, trained, tokenizer, prior):
    swap, _ = trained(tokenizer, prior)
    result = call_main("evaluate", experiment, *swap)
    assert result["metrics"]["mse"] > 0 and result["baselines"]["copy_last_frame"]["mse"] > 0


def test_a_fresh_process_predicts_the_same(trained):
    """Each prior over each kind of latents that it takes."""
    kinds = ("hr_vqvae", "kl_vae", "vgg", "pixel")
    folders = [str(trained(*cell)[1]) for cell in CELLS if cell[0] in kinds]
    command = [sys.executable, "-c", FRESH, *folders]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200, cwd=Path(__file__).parent)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1]) == [futures(folder) for folder in folders]
