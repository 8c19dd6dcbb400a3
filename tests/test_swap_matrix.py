"""Every tokenizer with every prior by ``tokenizer=X prior=Y`` alone, through all tools, as docs/matrix.md says it."""

import functools
import hashlib
import re
from pathlib import Path

import pytest
import torch
import yaml
from tiny_experiment import EXPERIMENT, Started, call_main, finished

from latentcast import VideoPredictionPipeline
from latentcast.config import MisfitError, config_root, instantiate, load_config
from latentcast.pairing import plan_prior, plan_tokenizer

TOKENIZERS, PRIORS = (
    sorted(path.stem for path in (config_root() / group).glob("*.yaml")) for group in ("tokenizer", "prior")
)
CODES = {"vqvae", "sliced_vqvae", "hr_vqvae", "residual_vqvae", "fsq", "lfq", "diffusers_vq", "pixel"}
VECTORS = {"dcgan", "vgg"}
CODE_PRIORS = {"video_transformer", "st_pixelcnn", "masked_transformer"}


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
STEPPING = ("residual_diffusion", "sde_diffusion", "flow_transformer")
FEW_STEPS = {"preview": {"sampler": {"n_steps": 2}}}
SIZES = {
    "tokenizer": {
        **dict.fromkeys(("vqvae", "hr_vqvae", "residual_vqvae"), VQ),
        "sliced_vqvae": VQ | {"n_codebooks": 2},
        "fsq": CONVOLUTIONS | {"levels": [8, 6, 5]},
        "lfq": CONVOLUTIONS | {"embedding_dim": 4, "n_codebooks": 2},
        "kl_vae": {"block_channels": [8, 16], "norm_groups": 4, "latent_channels": 3},
        "dcgan": {"embedding_dim": 8, "hidden_channels": 4},
        "vgg": {"embedding_dim": 8, "hidden_channels": 4},
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
        "masked_transformer": {"dim": 16, "n_layers": 1, "n_heads": 2, "head_dim": 8},
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
        "flow_transformer": {"max_positions": 16, "dim": 16, "n_layers": 1, "n_heads": 2, "head_dim": 8},
    },
}
MATRIX = EXPERIMENT | {
    "defaults": EXPERIMENT["defaults"] | {"prior": "video_transformer", "protocol": "video_folder"},
    "clip_length": 4,
    "n_context": 2,
    "batch_size": 4,
    "data": EXPERIMENT["data"] | {"n_videos": 4, "n_heldout_videos": 1},
    "ema_decay": 0,
    "trainer": EXPERIMENT["trainer"] | {"max_steps": 2},
    "preview": {"n_clips": 1, "num_samples": 1, "every_n_steps": 0, "figures": []},
    "protocol": {"n_clips": 1, "n_predicted": 2, "n_samples": 1, "metrics": ["mse"]},
    "evaluation": {"baselines": ["copy_last_frame"]},
    "when": {
        group: {name: {group: sizes} | (FEW_STEPS if name in STEPPING else {}) for name, sizes in sizes_of.items()}
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
        assert call_main("train_prior", experiment, *swap)["steps"] == 2
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


def test_a_fresh_process_predicts_the_same(trained, tmp_path):
    """Each prior over each kind of latents that it takes."""
    kinds = ("hr_vqvae", "kl_vae", "vgg", "pixel")
    folders = [str(trained(*cell)[1]) for cell in CELLS if cell[0] in kinds]
    (tmp_path / "fresh.py").write_text(FRESH)
    status, found, err = finished(Started(tmp_path / "fresh.py", *folders, cwd=tmp_path))
    assert status == 0, err
    assert found == [futures(folder) for folder in folders]


def planned(experiment, priors=PRIORS, **overrides):
    """Tokenizer, prior -> what the prior works on, or the MisfitError."""
    settings = [f"{name}={value}" for name, value in overrides.items()]

    def with_(choice):
        return load_config(experiment, [*settings, choice], "train_prior")

    tokenizers = {name: plan_tokenizer(with_(f"tokenizer={name}")) for name in TOKENIZERS}
    priors = {name: with_(f"prior={name}") for name in priors}
    found = {}
    for name, tokenizer in tokenizers.items():
        for prior, config in priors.items():
            try:
                plan = plan_prior(config, tokenizer)
                plan.check_context(config.n_context, config.clip_length)
                found[name, prior] = plan.accepts
            except MisfitError as error:
                found[name, prior] = error
    return found


def test_the_docs_say_what_the_code_says():
    """With the sizes for small machines, as with those of the groups' files."""
    text = (Path(__file__).parents[1] / "docs/matrix.md").read_text()
    head, _, *rows = (line.strip("| ").split(" | ") for line in re.findall(r"^\|.*", text, re.MULTILINE))
    head = [re.sub(r"[`| ]", "", name) for name in head]
    said = {(row[0].strip("`"), prior): cell.strip("*") for row in rows for prior, cell in zip(head, row[1:])}
    small = planned("video_folder_small", **{"data.root": "x"})
    reasons = {"codes": "– no codes", "positions": "– one position"}
    shown = {cell: found if isinstance(found, str) else reasons[found.needs] for cell, found in small.items()}
    assert said == shown
    levelled = [prior for prior in PRIORS if prior.endswith("_diffusion")]
    large = planned("quickstart", levelled, frame_size=16)  # whose least latents are 2 x 2
    assert {cell for cell, found in large.items() if isinstance(found, str)} == {c for c in CELLS if c[1] in levelled}


@pytest.mark.parametrize(
    "tool, swap, expected",
    [
        (
            "train_tokenizer",
            ["tokenizer=kl_vae"],
            "VideoTransformer over KLVAE: the video transformer needs codes, found",
        ),
        (
            "encode_dataset",
            ["tokenizer=vgg", "prior=sde_diffusion"],
            "SDEDiffusion over VGGAutoencoder: STDiff normalises",
        ),
        (
            "train_prior",
            ["tokenizer=pixel", "tokenizer.levels=null"],
            r"continuous pixels \(tokenizer.levels=256 makes",
        ),
    ],
)
def test_what_cannot_fit_is_refused_at_once_with_what_would(experiment, tmp_path, tool, swap, expected):
    run_dir = tmp_path / "run"
    with pytest.raises(MisfitError, match=expected) as caught:
        call_main(tool, experiment, *swap, f"run_dir={run_dir}")
    assert not run_dir.exists() and "\n" not in str(caught.value)
    tokenizers, priors = re.search("what fits: tokenizer=(.*), or prior=(.*)", str(caught.value)).groups()
    tokenizer, prior = swap[0].partition("=")[2], "sde_diffusion" if "vgg" in swap[0] else "video_transformer"
    assert tokenizers.split(" or ") == [name for name in TOKENIZERS if fits(name, prior)]
    over = {"pixel": "kl_vae"}.get(tokenizer, tokenizer)  # continuous
    assert priors.split(" or ") == [name for name in PRIORS if fits(over, name)]


def test_levels_are_cut_to_the_latents_or_the_longest_that_fit_is_named(experiment, caplog):
    caplog.set_level("INFO")
    config = load_config(experiment, ["tokenizer=lfq", "prior=sde_diffusion"], "train_prior")  # 4 x 4 latents
    tokenizer = plan_tokenizer(config)
    found = plan_prior(config, tokenizer).config
    assert (found.block_channels, found.motion_channels, found.motion_kernels) == ([8, 16], [6, 8, 8], [3, 3, 3])
    assert not found.fit_levels and not caplog.messages  # the model itself, when it is built, says it
    instantiate(config.prior, latent_spec=tokenizer.latent_spec)
    assert "prior.block_channels=[8, 16, 16]: cut to [8, 16], for latents of 4 x 4" in caplog.messages
    config.prior.fit_levels = False
    with pytest.raises(
        MisfitError, match=r"prior.motion_channels: 4 of them .*found 4 x 4; take at most 3, \[6, 8, 8\]"
    ):
        plan_prior(config, tokenizer)
