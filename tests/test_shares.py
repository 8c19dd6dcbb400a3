"""Shares of a job, by whichever processes: the files are those of one process that does it all."""

import argparse
import contextlib
import json
import multiprocessing
import signal
import time

import psutil
import pytest
from noise_benchmark import Noise
from test_evaluate import TINY
from test_pipeline import transformer
from tiny_experiment import TOOLS, Started, call_tool, finished, free_port, start_tool, write_experiment
from video_files import counter_frames, encode

from latentcast import PixelTokenizer, VideoPredictionPipeline
from latentcast.cli import UserError
from latentcast.data.store.prepared import prepare
from latentcast.shares import Share, share_of

SPLITS = "cache.shard_videos=2", "cache.batch_frames=8", "cache.splits=[train,val]"


def contents(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def encoded(tmp_path_factory):
    """A tiny experiment over pixels, encoded by one process -> its latents' files."""
    folder = tmp_path_factory.mktemp("encoded")
    call_tool("encode_dataset", folder, *SPLITS, "tokenizer=pixel", "tokenizer.levels=4")
    return contents(folder / "run/latents")


def prepare_share(root, share, **options):
    return prepare(Noise(**options), root, share=share)


def test_shares_prepare_what_one_process_does_and_a_killed_one_goes_on(tmp_path):
    """The other share writes at the same time, and leaves alone what is being written."""
    prepare(Noise(), tmp_path / "plain")
    root, killed = tmp_path / "set", Share(0, 2)
    process = multiprocessing.get_context("forkserver").Process(
        target=prepare_share, args=(root, killed), kwargs={"kill_at": "train-4"}
    )
    process.start()
    assert prepare_share(root, Share(1, 2))["pending_shards"] in (2, 3)  # of 4
    process.join()
    assert process.exitcode == -signal.SIGKILL and not (root / "manifest.json").exists()
    kept = {path: path.stat().st_mtime_ns for path in root.rglob("*.safetensors")}
    assert len(kept) == 2  # shards 0 and 1 of the train split
    figures = prepare_share(root, killed)
    assert figures["counts"] == {"train": 5, "test": 2}
    assert all(path.stat().st_mtime_ns == stamp for path, stamp in kept.items())
    assert contents(root) == contents(tmp_path / "plain")
    assert prepare_share(root, Share(1, 2))["counts"] == {"train": 5, "test": 2}  # late, and with nothing to do


def test_shares_encode_what_one_process_does(encoded, tmp_path, command):
    experiment = write_experiment(tmp_path)
    arguments = experiment, *SPLITS, "tokenizer=pixel", "tokenizer.levels=4"
    status, figures, err = command("encode_dataset", *arguments, "--shards", "1/2")
    assert status == 0, err
    assert figures["splits"]["train"]["pending_shards"] == 6 and not list(tmp_path.rglob("manifest.json"))
    status, figures, err = command("encode_dataset", *arguments, "--shards", "0/2")
    assert status == 0 and figures["splits"]["train"]["videos"] == 24, err
    assert contents(tmp_path / "run/latents") == encoded
    for more, message in (
        (["cache.overwrite=true"], "--shards 1/2: not with overwrite=true"),
        (["--engine", "ray"], "--engine ray: it makes the shares itself; leave out --shards"),
    ):
        status, _, err = command("encode_dataset", *arguments, "--shards", "1/2", *more)
        assert status == 1 and message in err.splitlines()[-1]


@pytest.mark.parametrize("text", ["3", "4/4", "-1/4", "1/0", "a/b", "1/2/3"])
def test_what_is_no_share(text):
    with pytest.raises(argparse.ArgumentTypeError, match=f"expected I/N with I from 0 to N - 1, .*found '{text}'"):
        Share.parse(text)


def test_shares_and_ranks_do_not_mix(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match="--shards 0/2: expected a process by itself, found one of several"):
        share_of(argparse.Namespace(shards=Share(0, 2)))


def is_busy(process):
    """Whether it is a worker of Ray's that does a share."""
    with contextlib.suppress(psutil.Error):
        return process.cmdline()[:1] == ["ray::_run_share"]


def test_ray_encodes_what_one_process_does_though_a_worker_is_killed(encoded, tmp_path):
    pytest.importorskip("ray", reason="the extra latentcast[ray] is not installed")
    by_ray = "--engine", "ray", "--ray-shares", "4"
    process = start_tool("encode_dataset", tmp_path, *SPLITS, "tokenizer=pixel", "tokenizer.levels=4", *by_ray)
    train = tmp_path / "run/latents/train"
    while not list(train.glob("shard-*.json")):
        assert process.poll() is None, process.read()
        time.sleep(0.02)
    while not (busy := [p for p in psutil.Process(process.pid).children(recursive=True) if is_busy(p)]):
        assert process.poll() is None, process.read()
    busy[0].kill()
    _, err = process.communicate(timeout=280)
    assert process.returncode == 0, err
    assert contents(tmp_path / "run/latents") == encoded


@pytest.mark.parametrize("address", ["auto", "127.0.0.1:{port}", "ray://127.0.0.1:{port}", "127.0.0.1:99999"])
def test_a_cluster_that_is_not_there_is_named(tmp_path, command, monkeypatch, address):
    pytest.importorskip("ray", reason="the extra latentcast[ray] is not installed")
    address = address.format(port=free_port())
    monkeypatch.setenv("RAY_ADDRESS", address)
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path))
    status, _, err = command("encode_dataset", write_experiment(tmp_path), "--engine", "ray")
    assert status == 1 and err.splitlines()[-1].startswith(f"error: RAY_ADDRESS={address}: no Ray answers there")


def test_ray_prepares_and_evaluates_what_one_process_does(tmp_path, command):
    pytest.importorskip("ray", reason="the extra latentcast[ray] is not installed")
    source = tmp_path / "videos"
    for i, split in enumerate(("train", "val", "test")):
        (source / split).mkdir(parents=True, exist_ok=True)
        encode(source / split / f"{i}.mp4", counter_frames(6, first=20 * i))
    pipe = VideoPredictionPipeline(transformer(PixelTokenizer(1, 16, 16, levels=4).latent_spec), n_context=2)
    pipe.save_pretrained(tmp_path / "pipeline")
    prepared = ["folder", "--source", source, "frame_size=16", "channels=1"]
    evaluated = ["--pipeline", tmp_path / "pipeline", "--data", "moving_digits", "data.n_heldout_videos=8"]
    evaluated += ["data.digit_size=12", *TINY]
    results = []
    for name, how in (("here", []), ("ray", ["--engine", "ray", "--ray-shares", "2"])):
        made = tmp_path / name
        tools = [
            ("prepare_dataset", *prepared, "--output", made / "set", *how),
            ("evaluate", *evaluated, f"run_dir={made}", *how),
        ]
        if how:
            started = [Started(TOOLS / f"{tool}.py", *typed, cwd=tmp_path) for tool, *typed in tools]
            done = [finished(tool) for tool in started]
        else:
            done = [command(*tool) for tool in tools]
        for status, _, err in done:
            assert status == 0, err
        (result,) = made.glob("metrics/*.json")
        written = json.loads(result.read_text())
        results.append({key: written[key] for key in ("metrics", "baselines", "data")})
    assert contents(tmp_path / "ray/set") == contents(tmp_path / "here/set")
    assert results[0] == results[1]
