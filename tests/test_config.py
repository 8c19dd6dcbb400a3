"""Composition of experiments, their errors, building from them; and every YAML under configs/."""

import functools
from pathlib import Path

import pytest
import torch
from diffusers.optimization import get_scheduler
from noise_benchmark import Noise
from omegaconf import OmegaConf

from latentcast import config as config_module
from latentcast.config import TOOLS, ConfigError, config_root, find_target, instantiate, load_config, to_container
from latentcast.data.prepared import prepare

FILES = {
    "base.yaml": """
        name: null
        seed: 0
        run_dir: runs/${name}
        channels: 3
        sizes: [1, 2]
        optimizer: {_target_: torch.optim.AdamW, _partial_: true, lr: 0.1}
        preview: {sampler: {}}
        prior: null
        data: null
    """,
    "prior/linear.yaml": """
        _target_: torch.nn.Linear
        in_features: ${channels}
        out_features: 4
    """,
    "prior/convolution.yaml": """
        _target_: torch.nn.Conv1d
        in_channels: ${channels}
        out_channels: 4
        kernel_size: 3
    """,
    "data/folder.yaml": """
        _target_: torch.nn.Embedding
        num_embeddings: ???
        embedding_dim: 2
    """,
    "experiment/small.yaml": """
        defaults: {prior: linear}
        channels: 1
        prior: {out_features: 8}
        train_prior:
          seed: 5
          prior: {bias: false}
        train_jointly: {channels: 4}
    """,
    "experiment/needs_data.yaml": "defaults: {data: folder}",
}


@pytest.fixture
def configs(tmp_path, monkeypatch):
    """A small configs/ folder of its own; returns a function that adds a file to it."""

    def add(name, text):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        return path

    for name, text in FILES.items():
        add(name, text)
    monkeypatch.setattr(config_module, "config_root", lambda: tmp_path)
    return add


def line_of(function, *args, **kwargs):
    """The message of the ConfigError that a call raises; it must be one line."""
    with pytest.raises(ConfigError) as caught:
        function(*args, **kwargs)
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_an_experiment_is_composed_from_its_groups(configs):
    config = load_config("small")
    assert config.name == "small"
    assert config.run_dir == "runs/small"
    assert to_container(config.prior) == {"_target_": "torch.nn.Linear", "in_features": 1, "out_features": 8}
    assert config.seed == 0
    assert "defaults" not in config
    assert "train_prior" not in config


def test_a_tool_section_applies_to_that_tool_alone(configs):
    config = load_config("small", tool="train_prior")
    assert config.seed == 5
    assert config.prior.bias is False
    assert config.prior.out_features == 8
    assert "bias" not in load_config("small", tool="evaluate").prior


def test_joint_training_takes_both_sections(configs):
    config = load_config("small", tool="train_jointly")
    assert (config.seed, config.channels) == (5, 4) and config.prior.bias is False
    assert load_config("small", tool="train_prior").channels != 4


def test_overrides_come_last_and_are_parsed_as_yaml(configs):
    overrides = [
        "seed=7",
        "prior.out_features=2",
        "sizes=[16,1,1]",
        "channels=2",
        "run_dir=out/a=b",
        "optimizer.lr=1e-3",
    ]
    config = load_config("small", overrides, tool="train_prior")
    assert config.seed == 7
    assert config.prior.out_features == 2
    assert config.prior.in_features == 2
    assert list(config.sizes) == [16, 1, 1]
    assert config.run_dir == "out/a=b"
    assert config.optimizer.lr == 1e-3
    assert load_config("small", ["prior=null"]).prior is None
    assert load_config("small", ["optimizer=null"]).optimizer is None


def test_swapping_a_group_drops_the_settings_of_the_old_class(configs):
    config = load_config("small", ["prior.kernel_size=5", "prior=convolution"], tool="train_prior")
    assert to_container(config.prior) == {
        "_target_": "torch.nn.Conv1d",
        "in_channels": 1,
        "out_channels": 4,
        "kernel_size": 5,
    }
    assert config.seed == 5
    # Naming the group's own file swaps nothing.
    assert load_config("small", ["prior=linear"]).prior.out_features == 8


def test_a_yaml_file_anywhere_is_an_experiment(configs, tmp_path):
    path = configs("elsewhere/mine.yaml", "defaults: {prior: convolution}\nseed: 3")
    config = load_config(path)
    assert (config.name, config.seed, config.prior.kernel_size) == ("mine", 3, 3)
    # What a run leaves behind, a whole config, is one as well.
    saved = configs("elsewhere/config.yaml", OmegaConf.to_yaml(config, resolve=True))
    assert load_config(str(saved)) == OmegaConf.create(to_container(config))


def test_options_of_an_open_mapping_are_kept(configs):
    assert load_config("small", ["preview.sampler.temperature=0.9"]).preview.sampler.temperature == 0.9


def test_another_class_keeps_the_place_but_not_the_arguments(configs):
    config = load_config("small", ["optimizer._target_=torch.optim.SGD", "optimizer.momentum=0.9", "optimizer.lr=0.2"])
    assert to_container(config.optimizer) == {
        "_target_": "torch.optim.SGD",
        "_partial_": True,
        "momentum": 0.9,
        "lr": 0.2,
    }


@pytest.mark.parametrize(
    "overrides, expected",
    [
        (["sed=1"], "unknown key 'sed'; did you mean 'seed'?"),
        (["prior.out_feature=1"], "unknown key 'prior.out_feature'; did you mean 'out_features'?"),
        (["optimizer.weight_decai=1"], "unknown key 'optimizer.weight_decai'; did you mean 'weight_decay'?"),
        (["prior=liner"], "prior: no config named 'liner'; did you mean 'linear'?"),
        (["data.root=x"], "override 'data.root=x': the experiment has no data; choose one by data=NAME"),
        (["seed"], "override 'seed': expected key=value"),
        (["=3"], "override '=3': expected key=value"),
        (["prior..x=3"], "override 'prior..x=3': expected key=value"),
        (["sizes=[1"], "override 'sizes=[1'"),
        (["seed.x=3"], "seed: expected a value like 0, found a mapping"),
        (["sizes.x=3"], "sizes: expected a value like [1, 2], found a mapping"),
        (["optimizer=adam"], "optimizer: expected a mapping, found adam"),
        (["run_dir=${nowhere}"], "nowhere"),
        (["seed=abc"], "seed: expected a number, found 'abc'"),
        (["seed=true"], "seed: expected a number, found True"),
        (["seed=[1]"], "seed: expected a number, found [1]"),
        (["sizes=3"], "sizes: expected a list, found 3"),
        (["optimizer._partial_=maybe"], "optimizer._partial_: expected true or false, found 'maybe'"),
        (["prior.in_features=abc"], "prior.in_features: expected a number, found 'abc'"),
    ],
)
def test_a_bad_override_is_one_clear_line(configs, overrides, expected):
    assert expected in line_of(load_config, "small", overrides)


@pytest.mark.parametrize(
    "text, expected",
    [
        ("defaults: {priors: linear}", "unknown group 'priors' under defaults; did you mean 'prior'?"),
        ("defaults: [prior]", "expected a mapping group: name under defaults"),
        ("defaults: {prior: nothing}", "prior: no config named 'nothing'; known: convolution, linear"),
        ("evaluate: {sed: 1}", "unknown key 'sed'; did you mean 'seed'?"),  # also for another tool
        ("sample: {seed: 1}", "unknown key 'sample'"),  # a section of no tool
        ("seed: [1", "not valid YAML"),
        ("seed: 1\nseed: 2", "not valid YAML"),
        ("- seed", "expected a mapping at the top"),
    ],
)
def test_a_bad_file_is_one_clear_line(configs, text, expected):
    path = configs("bad.yaml", text)
    assert expected in line_of(load_config, path)


def test_an_unknown_experiment_names_the_nearest(configs, tmp_path):
    assert line_of(load_config, "smal") == "experiment: no config named 'smal'; did you mean 'small'?"
    assert "not found" in line_of(load_config, "nowhere.yaml")
    (tmp_path / "latin.yaml").write_bytes("name: caf\xe9".encode("latin-1"))
    assert "latin.yaml" in line_of(load_config, tmp_path / "latin.yaml")


def test_a_value_that_must_be_given_is_named(configs):
    config = load_config("needs_data")
    message = line_of(instantiate, config.data)
    assert message == "data.num_embeddings: a value must be given (data.num_embeddings=...)"
    assert line_of(load_config, "needs_data", ["data.num_embeddings=null"]) == message
    assert instantiate(load_config("needs_data", ["data.num_embeddings=3"]).data).weight.shape == (3, 2)


def test_instantiate_builds_nested_lists_and_partials():
    built = instantiate(
        {
            "_target_": "torch.nn.TransformerEncoder",
            "num_layers": 2,
            "encoder_layer": {
                "_target_": "torch.nn.TransformerEncoderLayer",
                "d_model": 4,
                "nhead": 2,
                "batch_first": True,
            },
        }
    )
    assert len(built.layers) == 2
    parts = instantiate([{"_target_": "torch.nn.ReLU"}, {"plain": [1, {"_target_": "torch.nn.GELU"}]}, 3])
    assert isinstance(parts[0], torch.nn.ReLU)
    assert isinstance(parts[1]["plain"][1], torch.nn.GELU)
    assert parts[2] == 3
    partial = instantiate(OmegaConf.create({"_target_": "torch.optim.SGD", "_partial_": True, "lr": 0.5}))
    assert isinstance(partial, functools.partial)
    assert partial([torch.nn.Parameter(torch.zeros(1))]).param_groups[0]["lr"] == 0.5
    assert instantiate({"_target_": "torch.nn.Linear", "in_features": 2}, out_features=3).weight.shape == (3, 2)
    assert instantiate(None) is None


@pytest.mark.parametrize(
    "config, expected",
    [
        ({"_target_": "os.system", "command": "true"}, "only targets in latentcast, torch"),
        ({"_target_": "subprocess.Popen", "args": "true"}, "only targets in"),
        ({"_target_": "torch.os.system", "command": "true"}, "no such class"),
        ({"_target_": "torch.utils.collect_env.run", "command": "true"}, "expected a class"),
        ({"_target_": "torch.hub.load", "repo_or_dir": "x", "model": "y"}, "expected a class"),
        ({"_target_": "latentcast.data.base.Dataset"}, None),
        ({"_target_": "latentcast.config.Path"}, "defined in pathlib"),
        ({"_target_": "latentcast.VQVEA"}, "did you mean 'VQVAE'?"),
        ({"_target_": "torch.nn.Liner"}, "no such class"),
        ({"_target_": "torch"}, "no such class"),
        ({"_target_": 3}, "only targets in"),
        (
            {"_target_": "torch.nn.Linear", "in_feature": 3},
            "unknown argument 'in_feature'; did you mean 'in_features'?",
        ),
        ({"_target_": "torch.nn.Linear", "in_features": 3}, "missing argument 'out_features'"),
    ],
)
def test_what_instantiate_refuses(config, expected):
    if expected is None:
        assert find_target(config["_target_"]) is torch.utils.data.Dataset
    else:
        assert expected in line_of(instantiate, config)


# The configs that we ship -------------------------------------------------------------------------------------------

SHIPPED = Path(__file__).parents[1] / "configs"
EXPERIMENTS = sorted(path.stem for path in (SHIPPED / "experiment").glob("*.yaml"))
GROUP_FILES = sorted(
    (path.parent.name, path.stem) for path in SHIPPED.glob("*/*.yaml") if path.parent.name != "experiment"
)
ON_CPU = ["trainer.accelerator=cpu", "trainer.devices=1", "trainer.precision=32-true", "trainer.strategy=auto"]


def test_the_experiments_that_others_rely_on_are_there():
    assert config_root() == SHIPPED
    assert {"quickstart", "lvt_bair", "lvt_kinetics600", "video_folder"} <= set(EXPERIMENTS)


@pytest.mark.parametrize("group, name", GROUP_FILES)
def test_every_group_file_fits_its_class(group, name, tmp_path):
    (tmp_path / "only.yaml").write_text(f"defaults: {{{group}: {name}}}")
    config = load_config(tmp_path / "only.yaml")[group]
    known = [*config_module._parameters(find_target(config._target_)), "_target_", "_partial_"]
    assert [key for key in config if key not in known] == []


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_every_experiment_is_built(experiment, video_folder, tmp_path, monkeypatch):
    overrides = list(ON_CPU)
    config = load_config(experiment)
    if config.data._target_ == "latentcast.prepared_videos":
        monkeypatch.setattr("noise_benchmark.LENGTHS", {"train": (config.clip_length,)})
        prepare(Noise(name=config.data.name, frame_size=config.frame_size, channels=config.channels), tmp_path)
        overrides.append(f"data.root={tmp_path}")
    if OmegaConf.is_missing(config.data, "root"):
        overrides += [f"data.root={video_folder}", "data.val_fraction=0", "data.test_fraction=0"]
    for tool in (None, *TOOLS):
        config = load_config(experiment, overrides, tool=tool)
        assert to_container(config)["name"] == experiment
    config = load_config(experiment, overrides, tool="train_prior")
    tokenizer = instantiate(config.tokenizer)
    spec = tokenizer.latent_spec
    assert (spec["frame_channels"], spec["frame_height"]) == (config.channels, config.frame_size)
    if config.prior is not None:
        prior = instantiate(config.prior, latent_spec=spec)
        prior.check_context(config.n_context, config.clip_length)
        assert set(config.preview.sampler) <= set(prior.sampler_options())
    optimizer = instantiate(config.optimizer)([torch.nn.Parameter(torch.zeros(1))])
    get_scheduler(optimizer=optimizer, num_training_steps=10, **to_container(config.lr_scheduler))
    trainer = instantiate(config.trainer, logger=False, enable_checkpointing=False)
    assert trainer.max_steps == config.trainer.max_steps
    clip = instantiate(config.data)(split="train")[0]["frames"]
    assert clip.shape == (config.clip_length, config.channels, config.frame_size, config.frame_size)
