"""Composition of experiments, their errors, building from them; and every YAML under configs/."""

import functools
import re
import subprocess
import sys
from pathlib import Path

import diffusers
import pytest
import pytorch_lightning
import torch
from diffusers.optimization import get_scheduler
from noise_benchmark import Noise
from omegaconf import OmegaConf

import latentcast
from latentcast import PixelTokenizer
from latentcast import config as config_module
from latentcast.cli import UserError, parse_options
from latentcast.config import TOOLS, ConfigError, config_root, instantiate, load_config, to_container
from latentcast.data.store.prepared import prepare
from latentcast.modeling import known_models
from latentcast.sizes import as_size, sides
from latentcast.targets import _written_parameters, find_target, parameters_of
from latentcast.yaml_text import dump

TOOLS_DIR = Path(__file__).parents[1] / "tools"
FILES = {
    "base.yaml": """
        name: null
        seed: 0
        run_dir: runs/${name}
        channels: 3
        sizes: [1, 2]
        optimizer: {_target_: torch.optim.AdamW, _partial_: true, lr: 0.1}
        preview: {sampler: {}}
        tokenizer: null
        data: null
    """,
    "tokenizer/vqvae.yaml": """
        _target_: latentcast.VQVAE
        in_channels: ${channels}
        codebook_size: 4
    """,
    "tokenizer/fsq.yaml": """
        _target_: latentcast.FSQVAE
        in_channels: ${channels}
        n_codebooks: 4
        stride: 8
    """,
    "data/digits.yaml": """
        _target_: latentcast.MovingDigits
        split: train
        clip_length: 2
        n_videos: ???
    """,
    "experiment/small.yaml": """
        defaults: {tokenizer: vqvae}
        channels: 1
        tokenizer: {codebook_size: 8}
        train_prior:
          seed: 5
          tokenizer: {stride: 2}
        train_jointly: {channels: 4}
    """,
    "experiment/needs_data.yaml": "defaults: {data: digits}",
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
    assert to_container(config.tokenizer) == {"_target_": "latentcast.VQVAE", "in_channels": 1, "codebook_size": 8}
    assert config.seed == 0
    assert "defaults" not in config
    assert "train_prior" not in config


def test_a_tool_section_applies_to_that_tool_alone(configs):
    config = load_config("small", tool="train_prior")
    assert config.seed == 5
    assert config.tokenizer.stride == 2
    assert config.tokenizer.codebook_size == 8
    assert "stride" not in load_config("small", tool="evaluate").tokenizer


def test_joint_training_takes_both_sections(configs):
    config = load_config("small", tool="train_jointly")
    assert (config.seed, config.channels) == (5, 4) and config.tokenizer.stride == 2
    assert load_config("small", tool="train_prior").channels != 4


def test_a_section_can_be_overridden_from_the_command_line(configs):
    overrides = ["train_prior.seed=9", "channels=2", "train_prior.tokenizer.stride=4", "evaluate={seed: 3}"]
    config = load_config("small", overrides, tool="train_prior")
    assert (config.seed, config.channels, config.tokenizer.stride) == (9, 2, 4)
    assert load_config("small", overrides, tool="evaluate").seed == 3
    assert load_config("small", overrides).seed == 0
    assert load_config("small", ["train_prior.seed=9"], tool="train_jointly").seed == 9
    assert load_config("small", ["train_prior.seed=9", "seed=2"], tool="train_prior").seed == 2  # the later one counts
    for tool in ("train_prior", "evaluate"):  # a mistake is named whichever tool runs
        message = line_of(load_config, "small", ["train_prior.sed=9"], tool=tool)
        assert message == "unknown key 'sed'; did you mean 'seed'?"
    assert "override 'train_prior=3': expected train_prior.KEY=VALUE" in line_of(
        load_config, "small", ["train_prior=3"]
    )


@pytest.mark.parametrize(
    "override, home",
    [
        ("lr=1e-3", "'optimizer.lr'"),
        ("weight_decay=0", "'optimizer.weight_decay'"),  # an argument that no config has set
        ("preview.lr=1", "'optimizer.lr'"),
        ("sampler=1", "'preview.sampler'"),
        ("codebook_size=4", "'tokenizer.codebook_size'"),
    ],
)
def test_a_key_without_its_group_is_told_where_it_belongs(configs, override, home):
    key = override.partition("=")[0]
    assert line_of(load_config, "small", [override]) == f"unknown key {key!r}; did you mean {home}?"


def test_an_argument_taken_from_another_key_is_called_by_that_key(configs):
    size = "frame_size: 64"
    configs("base.yaml", FILES["base.yaml"].replace("seed: 0", f"seed: 0\n        {size}"))
    configs("tokenizer/sized.yaml", "{_target_: latentcast.VQVAE, height: '${frame_size}', width: '${frame_size}'}")
    config = load_config("small", ["tokenizer=sized", "frame_size=63"])
    with pytest.raises(ValueError) as caught:
        instantiate(config.tokenizer)
    expected = "frame_size=63 (as tokenizer.height, tokenizer.width): expected multiples of the stride 4, found 63, 63"
    expected += "; the nearest are 64 x 64"
    assert str(caught.value) == expected
    config = load_config("small", ["tokenizer=sized", "tokenizer.height=63"])
    expected = (
        r"^tokenizer.height, tokenizer.width: expected multiples of the stride 4, found 63, 64; the nearest are 64"
    )
    with pytest.raises(ValueError, match=expected):
        instantiate(config.tokenizer)


def test_overrides_come_last_and_are_parsed_as_yaml(configs):
    overrides = [
        "seed=7",
        "tokenizer.codebook_size=2",
        "sizes=[16,1,1]",
        "channels=2",
        "run_dir=out/a=b",
        "optimizer.lr=1e-3",
    ]
    config = load_config("small", overrides, tool="train_prior")
    assert config.seed == 7
    assert config.tokenizer.codebook_size == 2
    assert config.tokenizer.in_channels == 2
    assert list(config.sizes) == [16, 1, 1]
    assert config.run_dir == "out/a=b"
    assert config.optimizer.lr == 1e-3
    assert load_config("small", ["tokenizer=null"]).tokenizer is None


@pytest.mark.parametrize(
    "override, expected",
    [
        ("name=2024", "2024"),
        ("name=007", "007"),
        ("name=1e3", "1e3"),
        ("name=true", "true"),
        ("name=12:30", "12:30"),
        ("name=a: b", "a: b"),
        ("name=- a", "- a"),
        ("name=#1", "#1"),
        ("name='a # b'", "a # b"),
        ("name='a' or 'b'", "'a' or 'b'"),
        ('name="a\\n\\"#"', 'a\n"#'),
        ("run_dir=2024", "2024"),
        ("run_dir=[1]", "[1]"),
        ("run_dir=/x/take #2", "/x/take #2"),
        ("run_dir=/x/ two  spaces ", "/x/ two  spaces "),
        ("run_dir=/x/caf\udce9", "/x/caf\udce9"),
        ("run_dir=/x/a\nb", "/x/a\nb"),
        ("run_dir=~", "/home/me"),
        ("run_dir=~/x", "/home/me/x"),
        ("run_dir=~nobody-here/x", "~nobody-here/x"),
        ("run_dir='~/x'", "/home/me/x"),
        ("run_dir=runs/${seed} #1", "runs/0 #1"),
        ("data.mnist_dir=~/mnist #1", "/home/me/mnist #1"),
        ("data.mnist_dir=null", None),
        ("data.mnist_dir=", None),
        ("wandb.project=123", "123"),
        ("wandb.tags=[1, 02, 12:30, a #1, true]", ["1", "02", "12:30", "a #1", "true"]),
        ("preview.sampler.top_k=3", 3),
        ("preview.sampler.when=12:30", "12:30"),
        ("preview.sampler.when=a #1", "a #1"),
        ("preview.sampler.name={name: 1, x: ~/y, dirpath: ~/y}", "{name: 1, x: ~/y, dirpath: ~/y}"),
        ("preview.sampler.more={name: 1, x: ~/y, dirpath: ~/y}", {"name": "1", "x": "~/y", "dirpath": "/home/me/y"}),
    ],
)
def test_paths_and_names_are_the_text_they_are(override, expected, monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    config = load_config("quickstart", ["preview.sampler={}" if "sampler" in override else "seed=0", override])
    value = OmegaConf.select(config, override.partition("=")[0])
    assert (OmegaConf.to_container(value) if OmegaConf.is_config(value) else value) == expected
    assert type(value) is not bool


def test_paths_and_names_in_files_are_text(configs, monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    text = "name: 2024\nrun_dir: ~/runs/${name} # mine\nseed: 1_0\npreview: {sampler: {tags: [1, 0x2]}}"
    config = load_config(configs("x.yaml", text))
    assert (config.name, config.run_dir, config.seed) == ("2024", "/home/me/runs/2024", 10)
    assert config.preview.sampler.tags == ["1", "0x2"]
    # Anchors are YAML's own references.
    text = "preview: {sampler: &s {a: 1}}\ntrain_prior: {preview: {sampler: {x: {<<: *s, a: 3, b: 2}}}}"
    config = load_config(configs("x.yaml", text), tool="train_prior")
    assert to_container(config.preview.sampler) == {"a": 1, "x": {"a": 3, "b": 2}}


def test_a_saved_config_is_read_as_it_was(configs):
    options = ["name=007", "run_dir=/x/caf\udce9 #1", "preview.sampler.a='1e3'", "preview.sampler.b='12'"]
    config = load_config("small", [*options, "preview.sampler.c=12:30", "preview.sampler.d=1e-5"])
    assert to_container(load_config(configs("saved.yaml", dump(to_container(config))))) == to_container(config)
    assert to_container(config.preview.sampler) == {"a": "1e3", "b": "12", "c": "12:30", "d": 1e-5}


@pytest.mark.parametrize(
    "override, expected",
    [
        ("seed=3 # comment", "seed: expected a number, found '3 # comment'"),
        ("wandb.tags=1", "wandb.tags: expected a list, found '1'"),
        ("wandb.project=[1", None),
        ("trainer.callbacks=[{a: b}", "not valid YAML"),
    ],
)
def test_what_is_no_text_stays_yaml(override, expected):
    if expected is None:
        assert load_config("quickstart", [override]).wandb.project == "[1"
    else:
        assert expected in line_of(load_config, "quickstart", [override])


def test_tools_take_options_and_paths_the_same_way(tmp_path, monkeypatch, command):
    monkeypatch.setenv("HOME", str(tmp_path))
    options = ["temperature=0.9", "a.b=1", "a.c=x #2", "name=2024", "index_dir=~/i"]
    found = {"temperature": 0.9, "a": {"b": 1, "c": "x #2"}, "name": "2024", "index_dir": f"{tmp_path}/i"}
    assert parse_options(options) == found
    for wrong in (["x"], ["a=1", "a.b=2"], ["a=[1"]):
        with pytest.raises((UserError, ValueError)):
            parse_options(wrong)
    (tmp_path / "mine.yaml").write_text("seed: 3")
    assert load_config("~/mine.yaml").seed == 3
    assert f"error: {tmp_path}/videos" in command("prepare_dataset", "check", "~/videos")[2]
    assert f"--input {tmp_path}/videos: no such" in command("sample", "--pipeline", "~/p", "--input", "~/videos")[2]


def test_swapping_a_group_drops_the_settings_of_the_old_class(configs):
    config = load_config("small", ["tokenizer.stride=5", "tokenizer=fsq"], tool="train_prior")
    assert to_container(config.tokenizer) == {
        "_target_": "latentcast.FSQVAE",
        "in_channels": 1,
        "n_codebooks": 4,
        "stride": 5,
    }
    assert config.seed == 5
    # Naming the group's own file swaps nothing.
    assert load_config("small", ["tokenizer=vqvae"]).tokenizer.codebook_size == 8


def test_a_yaml_file_anywhere_is_an_experiment(configs, tmp_path):
    path = configs("elsewhere/mine.yaml", "defaults: {tokenizer: fsq}\nseed: 3")
    config = load_config(path)
    assert (config.name, config.seed, config.tokenizer.stride) == ("mine", 3, 8)
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
        (["tokenizer.codebook_siz=1"], "unknown key 'tokenizer.codebook_siz'; did you mean 'tokenizer.codebook_size'?"),
        (["optimizer.weight_decai=1"], "unknown key 'optimizer.weight_decai'; did you mean 'optimizer.weight_decay'?"),
        (["tokenizer=vqva"], "tokenizer: no config named 'vqva'; did you mean 'vqvae'?"),
        (["data.root=x"], "override 'data.root=x': the experiment has no data; choose one by data=NAME"),
        (["seed"], "override 'seed': expected key=value"),
        (["=3"], "override '=3': expected key=value"),
        (["tokenizer..x=3"], "override 'tokenizer..x=3': expected key=value"),
        (["sizes=[1"], "override 'sizes=[1'"),
        (["seed.x=3"], "seed: expected a value like 0, found a mapping"),
        (["sizes.x=3"], "sizes: expected a value like [1, 2], found a mapping"),
        (["optimizer=adam"], "optimizer: expected a mapping, found 'adam'"),
        (["optimizer=null"], "optimizer: expected a mapping, found null"),
        (["seed=null"], "seed: expected a number, found null"),
        (["sizes=null"], "sizes: expected a list, found null"),
        (["preview.sampler=null"], "preview.sampler: expected a mapping, found null"),
        (["run_dir="], "run_dir: expected text, found null"),
        (["run_dir=${nowhere}"], "nowhere"),
        (["seed=abc"], "seed: expected a number, found 'abc'"),
        (["seed=true"], "seed: expected a number, found True"),
        (["seed=[1]"], "seed: expected a number, found [1]"),
        (["sizes=3"], "sizes: expected a list, found 3"),
        (["optimizer._partial_=maybe"], "optimizer._partial_: expected true or false, found 'maybe'"),
        (["tokenizer.in_channels=abc"], "tokenizer.in_channels: expected a number, found 'abc'"),
    ],
)
def test_a_bad_override_is_one_clear_line(configs, overrides, expected):
    assert expected in line_of(load_config, "small", overrides)


@pytest.mark.parametrize(
    "text, expected",
    [
        ("defaults: {tokenizers: vqvae}", "unknown group 'tokenizers' under defaults; did you mean 'tokenizer'?"),
        ("defaults: [tokenizer]", "expected a mapping group: name under defaults"),
        ("defaults: {tokenizer: nothing}", "tokenizer: no config named 'nothing'; known: fsq, vqvae"),
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
    assert message == "data.n_videos: a value must be given (data.n_videos=...)"
    assert line_of(load_config, "needs_data", ["data.n_videos=null"]) == message
    assert len(instantiate(load_config("needs_data", ["data.n_videos=3"]).data).videos) == 3


def test_instantiate_builds_nested_lists_and_partials():
    trainer = instantiate(
        {
            "_target_": "pytorch_lightning.Trainer",
            "logger": False,
            "accelerator": "cpu",
            "callbacks": [{"_target_": "pytorch_lightning.callbacks.Timer", "interval": "step"}],
            "plugins": [
                {
                    "_target_": "pytorch_lightning.plugins.AsyncCheckpointIO",
                    "checkpoint_io": {"_target_": "pytorch_lightning.plugins.TorchCheckpointIO"},
                }
            ],
        }
    )
    assert any(isinstance(callback, pytorch_lightning.callbacks.Timer) for callback in trainer.callbacks)
    assert isinstance(trainer.strategy.checkpoint_io.checkpoint_io, pytorch_lightning.plugins.TorchCheckpointIO)
    network = {"_target_": "diffusers.VQModel"}
    parts = instantiate([{"_target_": "latentcast.PixelTokenizer"}, {"plain": [1, network]}, 3])
    assert isinstance(parts[0], PixelTokenizer)
    assert isinstance(parts[1]["plain"][1], diffusers.VQModel)
    assert parts[2] == 3
    assert isinstance(instantiate({"_target_": "diffusers.DDIMScheduler"}), diffusers.DDIMScheduler)
    partial = instantiate(OmegaConf.create({"_target_": "torch.optim.SGD", "_partial_": True, "lr": 0.5}))
    assert isinstance(partial, functools.partial)
    assert partial([torch.nn.Parameter(torch.zeros(1))]).param_groups[0]["lr"] == 0.5
    # An argument that the caller gives is not built from the config.
    config = {"_target_": "latentcast.PixelTokenizer", "height": {"_target_": "latentcast.VQVAE"}, "width": 8}
    assert "no class stands here" in line_of(instantiate, config, height=8)
    assert instantiate(config | {"height": 4}, height=8).config.height == 8
    assert instantiate(None) is None


@pytest.mark.parametrize(
    "config, expected",
    [
        ({"_target_": "os.system", "command": "true"}, "_target_: expected a tokenizer or a prior or a data set or"),
        ({"_target_": "latentcast.VQVEA"}, "found 'latentcast.VQVEA'"),
        ({"_target_": "latentcast.write_video"}, "found 'latentcast.write_video'"),
        ({"_target_": "torch"}, "found 'torch'"),
        ({"_target_": 3}, "found 3"),
        ({"_target_": None}, "found None"),
        (
            {"_target_": "latentcast.VQVAE", "codebook_siz": 3},
            "unknown argument 'codebook_siz'; did you mean 'codebook_size'?",
        ),
        ({"_target_": "latentcast.VideoFolder", "root": "x"}, "missing argument 'split'"),
        ({"_target_": "latentcast.VQVAE", "codebook_size": 10**14}, "its sizes ask for more memory than there is"),
    ],
)
def test_what_instantiate_refuses(config, expected):
    assert expected in line_of(instantiate, config)


# The configs that we ship -------------------------------------------------------------------------------------------

SHIPPED = Path(__file__).parents[1] / "configs"
EXPERIMENTS = sorted(
    str(path.relative_to(SHIPPED / "experiment").with_suffix("")) for path in (SHIPPED / "experiment").rglob("*.yaml")
)
GROUP_FILES = sorted(
    (path.parent.name, path.stem) for path in SHIPPED.glob("*/*.yaml") if path.parent.name != "experiment"
)
ON_CPU = ["trainer.accelerator=cpu", "trainer.devices=1", "trainer.precision=32-true", "trainer.strategy=auto"]


def test_the_experiments_that_others_rely_on_are_there():
    assert config_root() == SHIPPED
    assert {"quickstart", "lvt_bair", "lvt_kinetics600", "video_folder"} <= set(EXPERIMENTS)


@pytest.mark.parametrize("name", [name for group, name in GROUP_FILES if group == "tokenizer"])
def test_frames_have_channels(name):
    config = load_config("quickstart", [f"tokenizer={name}", "channels=0"])
    expected = r"^channels=0 \(as tokenizer.in_channels\): expected a whole number of at least 1, found 0"
    with pytest.raises(ValueError, match=expected):
        instantiate(config.tokenizer)


@pytest.mark.parametrize("group, name", GROUP_FILES)
def test_every_group_file_fits_its_class(group, name, tmp_path):
    (tmp_path / "only.yaml").write_text(f"defaults: {{{group}: {name}}}")
    config = load_config(tmp_path / "only.yaml")[group]
    known = [*parameters_of(find_target(config._target_, group)), "_target_", "_partial_"]
    assert [key for key in config if key not in known] == []


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_every_experiment_is_built(experiment, video_folder, tmp_path, monkeypatch):
    for fill in ("kaiming_uniform_", "kaiming_normal_", "xavier_uniform_", "uniform_", "normal_"):
        monkeypatch.setattr(torch.nn.init, fill, lambda tensor, *_, **__: tensor)  # hundreds of millions of weights
    overrides = list(ON_CPU)
    config = load_config(experiment)
    if config.data._target_ == "latentcast.prepared_videos":
        monkeypatch.setattr("noise_benchmark.LENGTHS", {"train": (config.clip_length,)})
        prepare(Noise(name=config.data.name, frame_size=config.frame_size, channels=config.channels), tmp_path)
        overrides.append(f"data.root={tmp_path}")
        overrides += ["data.actions=false"] * config.data.get("actions", False)  # it has none
        overrides += ["data.fresh=false"] * config.data.get("fresh", False)  # what is prepared here is stored
    if OmegaConf.is_missing(config.data, "root"):
        overrides += [f"data.root={video_folder}", "data.val_fraction=0", "data.test_fraction=0"]
    for tool in (None, *TOOLS):
        config = load_config(experiment, overrides, tool=tool)
        assert to_container(config)["name"] == Path(experiment).name
        # No preset warms up past the end of a shortened run, but for those with the steps that were published.
        published = Path(experiment).name.startswith("stdiff_") and config.trainer and config.trainer.max_steps == -1
        assert tool not in ("train_tokenizer", "train_prior") or published or config.lr_scheduler.num_warmup_steps < 1
    config = load_config(experiment, overrides, tool="train_prior")
    tokenizer = instantiate(config.tokenizer)
    spec = tokenizer.latent_spec
    height, width = sides(as_size(config.frame_size))
    assert [spec[f"frame_{x}"] for x in ("channels", "height", "width")] == [config.channels, height, width]
    if config.prior is not None:
        prior = instantiate(config.prior, latent_spec=spec)
        prior.check_context(config.n_context, config.clip_length)
        assert set(config.preview.sampler) <= set(prior.sampler_options())
    optimizer = instantiate(config.optimizer)([torch.nn.Parameter(torch.zeros(1))])
    get_scheduler(optimizer=optimizer, num_training_steps=10, **to_container(config.lr_scheduler))
    trainer = instantiate(config.trainer, logger=False, enable_checkpointing=False)
    assert trainer.max_steps == config.trainer.max_steps
    clip = instantiate(config.data)(split="train")[0]["frames"]
    assert clip.shape == (config.clip_length, config.channels, height, width)


@pytest.mark.parametrize(
    "tokenizer, name",
    [
        ("kl_vae", "residual_diffusion"),
        ("kl_vae", "sde_diffusion"),
        ("kl_vae", "recurrent_vae"),
        ("sliced_vqvae", "video_transformer"),
        ("sliced_vqvae", "st_pixelcnn"),
        ("sliced_vqvae", "residual_diffusion"),
    ],
)
def test_the_preset_for_small_machines_has_sizes_for_every_prior(tokenizer, name):
    overrides = [f"tokenizer={tokenizer}", f"prior={name}", "data.root=x"]
    config = load_config("video_folder_small", overrides, tool="train_prior")
    prior = instantiate(config.prior, latent_spec=instantiate(config.tokenizer).latent_spec)
    prior.check_context(config.n_context, config.clip_length)
    assert sum(weights.numel() for weights in prior.parameters()) < 5e6


def test_what_an_experiment_says_of_a_choice_counts_where_it_is_chosen(configs):
    experiment = {
        "name": "mine",
        "defaults": {"tokenizer": "vqvae"},
        "channels": 1,
        "tokenizer": {"codebook_size": 16},
        "train_prior": {"seed": 1, "channels": 2},
        "when": {
            "tokenizer": {
                "fsq": {"tokenizer": {"n_codebooks": 2}, "channels": 3, "train_prior": {"seed": 2}},
                "vqvae": {"tokenizer": {"codebook_size": 32}},
            }
        },
    }
    own, other = load_config(experiment), load_config(experiment, ["tokenizer=fsq"], tool="train_prior")
    assert (own.tokenizer.codebook_size, own.channels) == (32, 1)
    assert (other.tokenizer.n_codebooks, other.tokenizer.stride, other.seed, other.channels) == (2, 8, 2, 2)
    assert "when" not in own and load_config(experiment, ["tokenizer=fsq"]).channels == 3
    assert load_config(experiment, ["tokenizer=fsq", "tokenizer.n_codebooks=9"]).tokenizer.n_codebooks == 9
    for when, message in (
        (3, "mine: when: expected a mapping, found 3"),
        ({"tokenizers": {}}, "mine: when: unknown group 'tokenizers'; did you mean 'tokenizer'?"),
        ({"tokenizer": {"fsk": {}}}, "tokenizer: no config named 'fsk'; did you mean 'fsq'?"),
        ({"tokenizer": {"vqvae": 1}}, "mine: when.tokenizer.vqvae: expected a mapping, found 1"),
        ({"tokenizer": {"vqvae": {"sed": 1}}}, "unknown key 'sed'; did you mean 'seed'?"),
        (
            {"tokenizer": {"vqvae": {"evaluate": 1}}},
            "mine: when.tokenizer.vqvae: evaluate: expected a mapping, found 1",
        ),
    ):
        assert line_of(load_config, experiment | {"when": when}) == message


def test_what_the_source_says_of_arguments_is_what_python_says(monkeypatch):
    models = known_models()
    others = ["pytorch_lightning.Trainer", "torch.optim.AdamW", "torch.optim.Adam"]
    classes = {path: find_target(path) for path in [*(f"latentcast.{name}" for name in models), *others]}
    classes["latentcast.VideoFolder"] = latentcast.VideoFolder
    for module in ("pytorch_lightning", "torch.optim"):
        monkeypatch.delitem(sys.modules, module)
    read = {path: _written_parameters.__wrapped__(path) for path in classes}
    monkeypatch.undo()
    for path, names in read.items():
        assert names is None or names == parameters_of(classes[path]), path
    assert {*others, "latentcast.VideoFolder", "latentcast.VQVAE"} <= {path for path in read if read[path]}


@pytest.mark.parametrize(
    "overrides, message",
    [
        (["data.rot=x"], "unknown key 'data.rot'; did you mean 'data.root'?"),
        (["data.root=x", "trainer.max_stps=3"], "unknown key 'trainer.max_stps'; did you mean 'trainer.max_steps'?"),
        (["data.root=x", "lr=3"], "unknown key 'lr'; did you mean 'optimizer.lr'?"),
        (["data.root=nowhere"], "data.root nowhere: no such folder of videos"),
        ([], "data.root: a value must be given (data.root=...)"),
    ],
)
@pytest.mark.parametrize("tool", ["train_tokenizer", "encode_dataset"])
def test_mistakes_show_before_what_takes_seconds_is_loaded(tmp_path, tool, overrides, message):
    command = [sys.executable, "-X", "importtime", str(TOOLS_DIR / f"{tool}.py"), "video_folder_small", *overrides]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100, cwd=tmp_path)
    assert done.returncode == 1 and done.stderr.splitlines()[-1] == f"error: {message}"
    assert not re.search(r"\| +(torch|diffusers|pytorch_lightning|av)$", done.stderr, re.MULTILINE)


def test_another_prior_drops_the_options_of_its_sampler():
    assert "temperature" in load_config("quickstart", tool="train_prior").preview.sampler
    config = load_config("quickstart", ["prior=residual_diffusion", "preview.num_samples=3"], tool="train_prior")
    assert config.preview.sampler == {} and config.preview.num_samples == 3
    config = load_config("quickstart", ["prior=residual_diffusion", "preview.sampler={n_steps: 4}"], tool="train_prior")
    assert config.preview.sampler == {"n_steps": 4}
    assert load_config("stdiff_kth", tool="evaluate").evaluation.sampler == {"horizon": 10}
    assert load_config("stdiff_kth", ["prior=recurrent_vae"], tool="evaluate").evaluation.sampler is None
