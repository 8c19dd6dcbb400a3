"""The protocols under configs/protocol: each loads, fits its data set, and says what its paper says."""

import inspect
import re

import pytest
import yaml

from latentcast import load_config
from latentcast.config import config_root, instantiate
from latentcast.data.sets import BENCHMARKS
from latentcast.targets import import_name

# context, predicted, samples, pixels: as the papers have it
PAPERS = {
    "svg_smmnist": (5, 20, 100, 64),
    "svg_kth": (10, 30, 100, 64),
    "svg_bair": (2, 28, 100, 64),
    "hafsvg_mnist2": (5, 25, 100, 64),
    "hafsvg_mnist3": (5, 25, 100, 64),
    "hafsvg_kth": (10, 20, 100, 64),
    "hafsvg_bair": (2, 28, 100, 64),
    "lvt_bair": (5, 11, 1, 64),
    "lvt_bair_bits": (1, 15, 1, 64),
    "lvt_kinetics600": (5, 11, 1, 64),
    "lvt_kinetics600_bits": (1, 15, 1, 64),
    "stdiff_smmnist": (5, 10, 10, 64),
    "stdiff_bair": (2, 28, 10, 64),
    "stdiff_kth": (10, 20, 10, 64),
    "stdiff_cityscapes": (2, 28, 10, 128),
    "stdiff_kitti": (4, 5, 10, 128),
    "stdiff_smmnist_2x": (5, 10, 10, 64),
    "stdiff_bair_2x": (2, 27, 10, 64),
    "stdiff_kitti_2x": (4, 5, 10, 128),
    "rvd_flow": (4, 16, 10, 128),
    "rvd_flow64": (4, 16, 10, 64),
    "rvd_kth": (4, 12, 10, 64),
    "rvd_bair": (4, 16, 10, 64),
    "rvd_cityscapes": (4, 16, 10, 128),
    "rvd_kth_val": (4, 12, 10, 64),
    "rvd_cityscapes_val": (4, 16, 10, 128),
    "shrvqvae_moving_mnist": (10, 10, 1, 64),
    "shrvqvae_kth": (10, 20, 1, 64),
}
OURS = {"small_smmnist": (5, 10, 10, 32), "small_mmnist": (10, 10, 10, 32), "small_flow": (4, 16, 10, 64)}
OURS |= {"pong_small": (4, 16, 4, 64), "cliff_small": (4, 12, 4, [16, 48])}
RECORDED = ("pong_small", "cliff_small")  # and not read: who wants them plays
FRAMES = {"bair": 30, "cityscapes": 30, "flow": 250, "gym": 500, "kitti": 100, "kth": 100}  # of most videos, at least


def protocol(name):
    return instantiate(load_config("quickstart", [f"protocol={name}"]).protocol)


def test_every_file_is_tested_here():
    assert {path.stem for path in (config_root() / "protocol").glob("*.yaml")} - {"one_digit", "video_folder"} == (
        PAPERS | OURS
    ).keys()


@pytest.mark.parametrize("name", PAPERS | OURS)
def test_protocol_has_the_papers_frames_and_samples(name):
    found = protocol(name)
    assert (found.n_context, found.n_predicted, found.n_samples, found.frame_size) == (PAPERS | OURS)[name]
    assert found.name == name and found.source and found.split == ("val" if name.endswith("_val") else "test")


@pytest.mark.parametrize("name", PAPERS)
def test_protocol_has_the_forms_that_its_papers_code_has(name):
    """PSNR by channel in SVG's and SRVP's, SRVP's Gaussian window, pictures of 8 bits in RVD's and 50 clips of val."""
    found = protocol(name)
    assert found.psnr == ("channel" if name.startswith(("svg_", "hafsvg_")) else "frame")
    assert found.ssim == ("uniform" if name.startswith(("hafsvg_", "shrvqvae_")) else "gaussian")
    assert found.rounded == name.startswith("rvd_")
    assert (found.n_clips == 50) == name.endswith("_val")
    text = (config_root() / "protocol" / f"{name}.yaml").read_text()
    assert "svg_" not in name or ("window" in text and "data range" in text)  # of the published SSIM


def test_latent_video_transformer_reconstructs_the_whole_clip():
    for name in ("lvt_bair", "lvt_kinetics600"):
        assert {"clip_mse", "fvd"} <= {*protocol(name).metrics}


@pytest.mark.parametrize("name", [name for name in PAPERS | OURS if name not in RECORDED])
def test_protocol_fits_the_set_that_its_command_prepares(name):
    found = protocol(name)
    text = (config_root() / "protocol" / f"{name}.yaml").read_text()
    (command,) = re.findall(r"^# Prepare: python tools/prepare_dataset.py (.+)$", text, re.MULTILINE)
    data, *words = command.split()
    options = {key: yaml.safe_load(value) for key, _, value in (word.partition("=") for word in words if "=" in word)}
    asked_split = words[words.index("--split") + 1] if "--split" in words else None

    benchmark = import_name(BENCHMARKS[found.data])
    assert data == found.data == benchmark.name
    assert found.data_protocol in benchmark.protocols
    assert (asked_split or benchmark.protocols[0]) == found.data_protocol
    arguments = inspect.signature(benchmark).parameters
    assert options.keys() <= arguments.keys()
    assert options.get("frame_size", arguments["frame_size"].default) == found.frame_size
    digits = {"n_digits", "digit_size", "max_speed"}
    shaped = {"moving_mnist": digits, "smmnist": digits, "flow": {"normalisation"}}.get(data, set())
    assert found.data_options.keys() == shaped  # options that change what a figure means
    for option, value in found.data_options.items():
        assert options.get(option, arguments[option].default) == value
    length = options.get("length") or options.get("max_frames") or getattr(benchmark, "usual_length", None)
    assert found.n_frames <= (length or FRAMES[data])


def test_quickstarts_own_protocol_loads():
    assert protocol("one_digit").data is None


@pytest.mark.parametrize("experiment, size, n_context", [("video_folder_small", 32, 4), ("video_folder", 64, 5)])
def test_protocol_for_ones_own_videos_follows_the_experiment(experiment, size, n_context):
    config = load_config(experiment, ["protocol=video_folder", "data.root=x"], tool="evaluate")
    found = instantiate(config.protocol)
    assert (found.frame_size, found.n_context, found.data) == (size, n_context, None)
    assert found.n_frames <= config.clip_length  # of what the training needs there is enough
    assert not {"lpips", "ilpips", "fvd"} & {*found.metrics}  # nothing is to be fetched
