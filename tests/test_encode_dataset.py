"""tools/encode_dataset.py on real data sets, alone and under torchrun."""

import argparse
import json
import logging
import os
import runpy
import subprocess
import sys
import time

import pytest
import torch
from safetensors.torch import load_file
from tiny_experiment import N_CLIPS, TOOLS, call_tool, run_tool, start_tool, tiny_config, write_experiment

from latentcast import VQVAE, LatentCacheDataset, instantiate, load_model
from latentcast.cli import UserError
from latentcast.data.base import EmptySplitError
from latentcast.modeling import fingerprint

SHARDS = "cache.shard_videos=5", "cache.batch_frames=32"


def save_tokenizer(folder, seed=0, **options):
    """What train_tokenizer leaves, untrained."""
    torch.manual_seed(seed)
    config = dict(tiny_config(folder).tokenizer)
    config.pop("_target_")
    VQVAE(**{**config, **options}).save_pretrained(folder / "run" / "tokenizer")
    return load_model(folder / "run" / "tokenizer")


def verify(folder):
    arguments = argparse.Namespace(experiment=str(write_experiment(folder)), overrides=[], verify=True)
    return runpy.run_path(str(TOOLS / "encode_dataset.py"))["main"](arguments)


def contents(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def encoded(tmp_path_factory):
    """A tiny experiment, encoded by one process -> (folder, figures, stderr)."""
    folder = tmp_path_factory.mktemp("encoded")
    save_tokenizer(folder)
    status, figures, err = run_tool("encode_dataset", folder, *SHARDS)
    assert status == 0, err
    return folder, figures, err


def test_encode_disk_decode_equals_forward(encoded):
    folder, figures, err = encoded
    assert (
        "5 of 5 shards to write, 144 frames as uint8 codes, 576 B" in err
        and "free" in err
        and "48 of 48 frames in" in err
    )
    tokenizer = load_model(folder / "run" / "tokenizer")
    n_videos = {"train": N_CLIPS, "val": 8, "test": 8}
    assert figures["splits"].keys() == n_videos.keys()
    for split, n in n_videos.items():
        root = folder / "run" / "latents" / split
        found = figures["splits"][split]
        assert (found["videos"], found["frames"], found["skipped"]) == (n, 6 * n, 0)
        assert found["frames_per_s"] > 0
        assert found["bytes"] == sum(path.stat().st_size for path in root.glob("*.safetensors"))
        videos = instantiate(tiny_config(folder).data)(split=split)
        cached = LatentCacheDataset(root, 6).expect(fingerprint(tokenizer), tokenizer.latent_spec, videos.describe())
        for i in range(n):
            frames, codes = videos.read_video(i, 0, 6)[None], cached.read_video(i)[None]
            with torch.no_grad():
                assert torch.equal(codes, tokenizer.encode(frames).codes)
                decoded = tokenizer.decode(tokenizer.codes_to_latents(codes))
                torch.testing.assert_close(decoded, tokenizer(frames).frames, atol=1e-5, rtol=1e-5)


def test_a_second_run_does_nothing(encoded, caplog):
    caplog.set_level(logging.INFO)
    folder, figures, _ = encoded
    before = contents(folder / "run")
    again = call_tool("encode_dataset", folder, *SHARDS)
    assert caplog.text.count("finished before, nothing to do") == 3
    assert again["splits"]["val"] == {**figures["splits"]["val"], "frames_per_s": None}
    assert contents(folder / "run") == before


def test_verify_reads_every_shard(encoded, tmp_path):
    n_shards = {"train": 5, "val": 2, "test": 2}
    assert verify(encoded[0]) == {"splits": {split: {"verified_shards": n} for split, n in n_shards.items()}}
    with pytest.raises(UserError, match=r"no latents cache here; run tools/encode_dataset.py"):
        verify(tmp_path)


def test_two_ranks_write_the_same_files(encoded, tmp_path):
    save_tokenizer(tmp_path)
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", str(TOOLS / "encode_dataset.py")]
    result = subprocess.run(
        [sys.executable, *command, str(write_experiment(tmp_path)), *SHARDS, "num_workers=1"],
        capture_output=True,
        text=True,
        timeout=150,
        cwd=tmp_path,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert result.returncode == 0, result.stderr
    (line,) = result.stdout.splitlines()
    assert json.loads(line)["splits"]["train"]["frames"] == 6 * N_CLIPS
    latents = "run/latents"
    assert contents(tmp_path / latents) == contents(encoded[0] / latents)


def test_kill_and_resume(tmp_path):
    tokenizer = save_tokenizer(tmp_path)
    overrides = "cache.shard_videos=1", "cache.splits=[train]", "data.n_videos=400"
    root = tmp_path / "run" / "latents" / "train"
    process = start_tool("encode_dataset", tmp_path, *overrides)
    while not (root / "shard-00002.json").exists():
        assert process.poll() is None, process.read()
        time.sleep(0.005)
    process.kill()
    process.communicate()
    finished = {path: path.stat().st_mtime_ns for path in root.glob("*.safetensors")}
    assert 3 <= len(finished) < 400 and not (root / "manifest.json").exists()
    with pytest.raises(FileNotFoundError, match=r"unfinished; run tools/encode_dataset.py, which resumes"):
        LatentCacheDataset(root, 4)
    assert call_tool("encode_dataset", tmp_path, *overrides)["splits"]["train"]["videos"] == 400
    # At most the shard whose note was missing is written again.
    assert sum(path.stat().st_mtime_ns == stamp for path, stamp in finished.items()) >= len(finished) - 1
    cached = LatentCacheDataset(root, 6)
    assert cached.verify() == 400 and len(list(root.iterdir())) == 401
    videos = instantiate(tiny_config(tmp_path, *overrides).data)(split="train")
    for i in (0, 2, len(finished), 399):
        assert torch.equal(cached.read_video(i), tokenizer.encode(videos.read_video(i, 0, 6)[None]).codes[0])


def test_another_tokenizer_or_size_is_refused(encoded, tmp_path):
    folder = encoded[0]
    before = contents(folder / "run" / "latents")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "latents").symlink_to(folder / "run" / "latents")
    other = save_tokenizer(tmp_path, seed=1)
    first = load_model(folder / "run" / "tokenizer")
    with pytest.raises(ValueError, match=f"made with tokenizer {fingerprint(first)}, asked for {fingerprint(other)}"):
        call_tool("encode_dataset", tmp_path, *SHARDS)
    with pytest.raises(ValueError, match=r"run/tokenizer: trained with frame_size=16, asked for 64; leave it out"):
        call_tool("encode_dataset", tmp_path, *SHARDS, "frame_size=64")
    with pytest.raises(ValueError, match=r"\(C, H, W\) = \(1, 16, 16\), the data set serves \(1, 64, 64\)"):
        call_tool("encode_dataset", tmp_path, *SHARDS, "data.size=64")
    with pytest.raises(ValueError, match=r"made with data.video_length 6, asked for 7"):
        call_tool("encode_dataset", folder, *SHARDS, "data.video_length=7")
    assert contents(folder / "run" / "latents") == before


def test_an_untrained_tokenizer_is_an_error_of_one_line(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(logging.root, "handlers", [])
    monkeypatch.setattr(sys, "argv", ["encode_dataset.py", str(write_experiment(tmp_path))])
    with pytest.raises(SystemExit) as exit:
        runpy.run_path(str(TOOLS / "encode_dataset.py"), run_name="__main__")
    out, err = capsys.readouterr()
    assert (exit.value.code, out) == (1, "")
    assert err == (
        f"tiny: loading; all goes to {tmp_path}/run\n"
        f"error: {tmp_path}/run/tokenizer: no trained tokenizer here; run tools/train_tokenizer.py first, or give one "
        "by tokenizer=PATH\n"
    )


def test_a_folder_of_videos_without_a_val_split(tmp_path, video_folder, caplog):
    """Real files at stride 2, pixels as codes: no training, and what is read back is the 8-bit video."""
    options = "tokenizer=pixel", "data=video_folder", f"data.root={video_folder}", "data.frame_stride=2"
    options += "data.val_fraction=0", "data.test_fraction=0", f"data.index_dir={tmp_path}", "num_workers=2"
    figures = call_tool("encode_dataset", tmp_path, *options, "cache.batch_frames=10")
    assert list(figures["splits"]) == ["train"]
    assert "val: nothing to encode" in caplog.text and "test: nothing to encode" in caplog.text
    data = instantiate(tiny_config(tmp_path, *options).data)(split="train")
    cached = LatentCacheDataset(tmp_path / "run" / "latents" / "train", 4)
    assert len(cached.videos) == figures["splits"]["train"]["videos"] == len(data.videos) == 6
    shards = [load_file(shard) for shard in sorted(cached.root.glob("*.safetensors"))]
    assert [len(tensor) for (tensor,) in map(dict.values, shards)] == [entry.n_frames for entry in data.videos]
    for i, entry in enumerate(data.videos):
        frames = data.read_video(i, 0, entry.n_frames)
        pixels = cached.read_video(i).movedim(-1, 1) / 127.5 - 1
        torch.testing.assert_close(pixels, frames, atol=1 / 255 + 1e-5, rtol=0)
    with pytest.raises(EmptySplitError, match="split 'train'"):
        call_tool("encode_dataset", tmp_path, *options, "clip_length=50")
