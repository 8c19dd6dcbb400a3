"""What a later tool takes from an earlier one: the tokenizer, its settings, its cache; and what stands against it."""

import json
import os
import shutil

import pytest
import torch
from tiny import tiny_tokenizer
from tiny_experiment import call_tool, tiny_config, write_experiment

from latentcast import LatentCacheDataset, VideoPredictionPipeline, instantiate, load_config, load_model
from latentcast.config import ConfigError
from latentcast.data.store.latent_cache import choose_store
from latentcast.modeling import find_tokenizer, fingerprint
from latentcast.yaml_text import parse

OTHER = ["frame_size=24", "tokenizer.codebook_size=12", "tokenizer.ema_decay=0.5"]  # than those of the experiment
DIFFUSION = ["prior=residual_diffusion", "prior.width=8", "prior.denoising_multipliers=[1]"]
DIFFUSION += ["prior.transform_multipliers=[1]", "preview.sampler={n_steps: 2}"]


@pytest.fixture(scope="module")
def first(tmp_path_factory):
    """A folder with a run whose tokenizer has other settings than its experiment, a cache of codes and a pipeline."""
    folder = tmp_path_factory.mktemp("first")
    call_tool("train_tokenizer", folder, *OTHER)
    call_tool("encode_dataset", folder)
    call_tool("train_prior", folder)
    return folder


def saved_config(path):
    return parse(path.read_text(), path)


def test_settings_of_the_tokenizer_are_not_repeated(first, caplog):
    config = saved_config(first / "run/config.yaml")
    assert config["frame_size"] == 24 and config["prior"]["n_frames"] == 4
    assert config["tokenizer"]["codebook_size"] == 12 and config["tokenizer"]["ema_decay"] == 0.5
    assert config["tokenizer"]["_target_"] == "latentcast.VQVAE" and "scaling_factor" not in config["tokenizer"]
    caplog.set_level("INFO")
    for tool in ("encode_dataset", "train_prior", "evaluate"):
        config = load_config(write_experiment(first), (), tool, go_on=True)
        assert config == load_config(write_experiment(first), ["tokenizer=null"], tool, go_on=True)
        assert (config.frame_size, config.tokenizer.codebook_size, config.data.size) == (24, 12, 24)
    assert (
        "taken as it was trained: frame_size=24 (the experiment says 16), tokenizer.codebook_size=12 (" in caplog.text
    )
    same = load_config(write_experiment(first), [*OTHER, "tokenizer=vqvae"], "train_prior", go_on=True)
    assert same.tokenizer == load_config(first / "run/config.yaml", (), go_on=True).tokenizer
    assert load_config(write_experiment(first), (), "train_tokenizer").frame_size == 16  # starts anew


@pytest.mark.parametrize("tool", ["encode_dataset", "train_prior", "evaluate"])
@pytest.mark.parametrize(
    "override, found",
    [
        ("frame_size=16", "frame_size=24, asked for 16"),
        ("channels=3", "channels=1, asked for 3"),
        ("tokenizer.codebook_size=16", "tokenizer.codebook_size=12, asked for 16"),
        ("tokenizer=fsq", "tokenizer._target_=VQVAE, asked for FSQVAE"),
    ],
)
def test_only_a_contradiction_is_an_error(first, tool, override, found):
    with pytest.raises(ConfigError, match=rf"run/(tokenizer|pipeline): trained with {found}; leave it out"):
        load_config(write_experiment(first), [override], tool, go_on=True)


def test_settings_of_the_data_are_those_of_the_cache(first, tmp_path, caplog):
    caplog.set_level("INFO")
    shared = [f"tokenizer={first / 'run'}", f"cache.root={tmp_path / 'latents'}"]
    call_tool("encode_dataset", tmp_path, *shared, "data.video_length=5", "data.speeds=[1]")
    config = load_config(write_experiment(tmp_path), shared, "train_prior", go_on=True)
    assert (config.data.video_length, config.data.speeds) == (5, [1])
    assert "latents: taken as it was encoded: data.video_length=5\n" in caplog.text  # speeds were left open
    assert call_tool("train_prior", tmp_path, *shared)["steps"] == 4
    for overrides, message in (
        (["data.video_length=6"], "latents/train: made with data.video_length 5, asked for 6"),
        (["data=smmnist"], "data"),
    ):
        with pytest.raises((ValueError, OSError), match=message):
            call_tool("train_prior", tmp_path, *shared, "overwrite=true", *overrides)


def test_what_was_left_open_is_taken_without_a_word(tmp_path, caplog):
    caplog.set_level("INFO")
    (tmp_path / "train").mkdir()
    data = {"type": "VideoFolder", "fps": 25.0, "frame_stride": 2}
    (tmp_path / "train/manifest.json").write_text(json.dumps({"data": data}))
    overrides = ["data.root=x", f"cache.root={tmp_path}"]
    config = load_config("video_folder_small", overrides, "train_prior", go_on=True)
    assert (config.data.fps, config.data.frame_stride) == (25.0, 2)
    assert "taken as it was encoded: data.frame_stride=2" in caplog.text and "fps" not in caplog.text


def test_an_evaluation_is_not_of_another_tokenizer(first, tmp_path):
    config = load_config(write_experiment(first), [f"tokenizer={first / 'run/tokenizer'}"], "evaluate", go_on=True)
    assert config.frame_size == 24
    instantiate(config.tokenizer, codebook_size=7).save_pretrained(tmp_path / "other")
    with pytest.raises(ConfigError, match=r"run/pipeline: trained with tokenizer.codebook_size=12, asked for 7"):
        load_config(write_experiment(first), [f"tokenizer={tmp_path / 'other'}"], "evaluate", go_on=True)


@pytest.mark.parametrize("place", ["run", "run/tokenizer", "run/pipeline"])
def test_a_second_prior_is_one_command(first, tmp_path, monkeypatch, place):
    """Also one over latents, which the tokenizer looks up by the codes of the cache."""
    reuse = [f"tokenizer={first / place}", f"cache.root={first / 'run/latents'}"]
    figures = call_tool("train_prior", tmp_path, *reuse, *(DIFFUSION if place == "run" else ()))
    pipeline = VideoPredictionPipeline.from_pretrained(figures["pipeline"])
    assert fingerprint(pipeline.tokenizer) == fingerprint(load_model(first / "run/tokenizer"))
    assert not (tmp_path / "run/tokenizer").exists() and not (tmp_path / "run/latents").exists()
    config = saved_config(tmp_path / "run/config.yaml")
    assert config["tokenizer_dir"] == str(first / place) and config["tokenizer"]["codebook_size"] == 12
    assert config["frame_size"] == 24 and config["cache"]["root"] == str(first / "run/latents")
    # The run's own config says it all; its pipeline serves as the next one's tokenizer.
    monkeypatch.chdir(tmp_path)  # resumed from elsewhere, its path is another one
    reuse[0] = f"tokenizer={os.path.relpath(first / place)}"
    again = call_tool(
        "train_prior", tmp_path, "resume=true", "trainer.max_steps=5", *reuse, *(DIFFUSION if place == "run" else ())
    )
    assert again["steps"] == 5
    assert find_tokenizer(load_config(tmp_path / "run/config.yaml", (), "train_prior", go_on=True), tmp_path / "run")
    third = load_config(write_experiment(tmp_path), [f"tokenizer={tmp_path / 'run'}"], "train_prior", go_on=True)
    assert third.tokenizer.codebook_size == 12


def test_a_group_goes_before_a_folder_of_its_name(first, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(first / "run/tokenizer", tmp_path / "vqvae")
    shutil.copytree(first / "run/tokenizer", tmp_path / "mine")
    config = load_config(write_experiment(tmp_path), ["tokenizer=vqvae"], "train_prior", go_on=True)
    assert config.tokenizer_dir is None and config.tokenizer.codebook_size == 16
    for overrides in (["tokenizer=mine"], ["tokenizer=./vqvae"]):
        config = load_config(write_experiment(tmp_path), overrides, "train_prior", go_on=True)
        assert config.tokenizer_dir == overrides[0].partition("=")[2] and config.tokenizer.codebook_size == 12
    again = load_config(dict(config) | {"name": "x"}, ["tokenizer=fsq"], "train_prior", go_on=True)
    assert again.tokenizer_dir is None and again.tokenizer._target_ == "latentcast.FSQVAE"
    with pytest.raises(ConfigError, match="tokenizer: no config named 'mime'"):
        load_config(write_experiment(tmp_path), ["tokenizer=mime"])
    named = {"name": "x", "defaults": {"tokenizer": "mine"}}
    assert load_config(named).frame_size == 24 and find_tokenizer(load_config(named), tmp_path / "run") is not None


def test_a_tokenizer_on_the_hub(first, tmp_path, monkeypatch):
    fetched = []

    def snapshot_download(name, allow_patterns):
        fetched.append(name)
        assert not [pattern for pattern in allow_patterns if pattern[0] == "*" and "index" not in pattern]  # no prior
        return str(first / "run/pipeline")

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    figures = call_tool("encode_dataset", tmp_path, "tokenizer=someone/videos")
    assert figures["splits"]["train"]["videos"] and set(fetched) == {"someone/videos"}
    expect = fingerprint(load_model(first / "run/tokenizer"))
    LatentCacheDataset(tmp_path / "run/latents/train", 4).expect(expect)

    def unreachable(name, **options):
        raise OSError("offline\nand more")

    monkeypatch.setattr("huggingface_hub.snapshot_download", unreachable)
    with pytest.raises(OSError, match=r"^tokenizer some/one: not a folder, and not on the hub \(offline\)$"):
        call_tool("train_prior", tmp_path, "tokenizer=some/one", "run_dir=elsewhere")


@pytest.mark.parametrize(
    "place, message",
    [
        ("no/such/folder", "tokenizer .*no/such/folder: not a folder"),
        ("run/latents", "no saved tokenizer here; expected the folder of one, of a run or of a pipeline"),
        ("run/prior", "run/prior/config.json: expected a tokenizer .*, found 'VideoTransformer'"),
    ],
)
def test_what_is_no_tokenizer_is_one_line(first, tmp_path, place, message):
    with pytest.raises((ValueError, OSError), match=message) as caught:
        call_tool("train_prior", tmp_path, f"tokenizer={first / place}")
    assert "\n" not in str(caught.value) and not (tmp_path / "run").exists()


def test_training_goes_on_from_a_trained_tokenizer(first, tmp_path):
    start = f"tokenizer={first / 'run'}"
    figures = call_tool("train_tokenizer", tmp_path, start, "optimizer.lr=0", "ema_decay=0", "trainer.max_steps=1")
    before, after = (load_model(path) for path in (first / "run/tokenizer", figures["tokenizer"]))
    for name, tensor in after.named_parameters():
        assert torch.equal(tensor, before.get_parameter(name)), name
    # The run's own is used from now on, however the one that it began with is named; another one is refused.
    for overrides in ([], [start], [f"tokenizer={tmp_path / 'run'}"]):
        config = load_config(write_experiment(tmp_path), overrides, "train_prior", go_on=True)
        assert fingerprint(find_tokenizer(config, tmp_path / "run")) == fingerprint(after)
    with pytest.raises(ValueError, match=r"run/pipeline: run_dir has a tokenizer of its own, .*; leave this one out"):
        load_config(write_experiment(tmp_path), [f"tokenizer={first / 'run/pipeline'}"], "train_prior", go_on=True)


@pytest.mark.parametrize("value", [{"_target_": "os.system", "command": "touch x"}, "${oc.env:HOME}", "${no.such.key}"])
def test_a_strangers_saved_tokenizer_says_nothing_but_values(first, tmp_path, value):
    stranger = shutil.copytree(first / "run/tokenizer", tmp_path / "stranger")
    config = json.loads((stranger / "config.json").read_text())
    (stranger / "config.json").write_text(json.dumps(config | {"codebook_size": value}))
    with pytest.raises(ConfigError) as caught:
        load_config(write_experiment(tmp_path), [f"tokenizer={stranger}"], "train_prior", go_on=True)
    assert "\n" not in str(caught.value)


def test_the_cache_follows_the_prior(first, tmp_path):
    run = ["tokenizer=" + str(first / "run")]
    call_tool("encode_dataset", tmp_path, *run, *DIFFUSION)
    latents = tmp_path / "run/latents"
    assert LatentCacheDataset(latents / "train", 4).manifest["store"] == "latents"
    looked_up = call_tool(
        "train_prior", tmp_path, *run, *DIFFUSION, f"cache.root={first}/run/latents", "run_dir=" + str(tmp_path / "a")
    )
    read = call_tool("train_prior", tmp_path, *run, *DIFFUSION)
    assert looked_up["val"] == read["val"]
    a, b = (load_model(figures["prior"]).state_dict() for figures in (looked_up, read))
    assert all(torch.equal(a[name], b[name]) for name in a)
    # A cache that cannot serve is named when it is encoded.
    with pytest.raises(
        ValueError, match=r"latents/train: made with store latents, asked for codes; .*set cache.overwrite"
    ):
        call_tool("encode_dataset", tmp_path, *run)
    with pytest.raises(
        ValueError, match=r"cache.store: VideoTransformer takes codes; expected auto or codes, found latents"
    ):
        call_tool("encode_dataset", tmp_path, *run, "cache.store=latents", "cache.overwrite=true")
    # What stands there and serves stays.
    figures = call_tool("encode_dataset", first, *DIFFUSION)
    assert figures["splits"]["train"]["frames_per_s"] is None
    assert LatentCacheDataset(first / "run/latents/train", 4).manifest["store"] == "codes"


def test_what_is_stored_for_which_prior_and_tokenizer(tmp_path):
    discrete, gaussian, plain = (tiny_tokenizer(name) for name in ("vqvae", "kl_vae", "dcgan"))
    config = tiny_config(tmp_path, *DIFFUSION)
    diffusion = {
        tokenizer: instantiate(config.prior, latent_spec=tokenizer.latent_spec) for tokenizer in (discrete, gaussian)
    }
    transformer = instantiate(tiny_config(tmp_path).prior, latent_spec=discrete.latent_spec)
    assert choose_store("auto", transformer, discrete, tmp_path) == "codes"
    assert choose_store("auto", diffusion[discrete], discrete, tmp_path) == "latents"
    assert choose_store("auto", diffusion[gaussian], gaussian, tmp_path) == "posterior"
    assert choose_store("auto", diffusion[gaussian], plain, tmp_path) == "latents"
    assert choose_store("codes", diffusion[discrete], discrete, tmp_path) == "codes"
    with pytest.raises(ValueError, match="prior: VideoTransformer takes codes, KLVAE has none; choose another"):
        choose_store("auto", transformer, gaussian, tmp_path)
