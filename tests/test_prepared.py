"""Prepared data sets: what is read back is what the source held, and an interrupted run goes on."""

import itertools
import json
import multiprocessing
import os
import resource
import shutil
import signal
import time
from pathlib import Path

import pytest
import torch
from noise_benchmark import LENGTHS, Noise, actions, noise
from safetensors import safe_open
from torch.utils.data import DataLoader

from latentcast import LatentCacheDataset, PixelTokenizer, PreparedVideos, prepared_videos
from latentcast.data.base import EmptySplitError, match_conditions
from latentcast.data.checking import check_folder
from latentcast.data.store.encoding import encode_dataset
from latentcast.data.store.prepared import IncompleteError, prepare


def contents(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    root = tmp_path_factory.mktemp("prepared") / "noise"
    prepare(Noise(), root)
    return root


def test_every_window_is_what_the_source_held(prepared):
    data = PreparedVideos(prepared, "train", 3, name="noise")
    assert [v.n_frames for v in data.videos] == list(LENGTHS["train"])
    assert len(data) == sum(n // 3 for n in LENGTHS["train"])
    for index, video in enumerate(data.videos):
        source = noise("train", video.name)
        for start in range(video.n_frames - 1):
            frames = data.read_video(index, start, start + 2)
            assert torch.equal(((frames + 1) * 127.5).round().to(torch.uint8), source[start : start + 2])
            conditions = data.read_conditions(index, start, start + 2)
            assert torch.equal(conditions["actions"], actions(source)[start : start + 2])
            assert conditions["label"] == index
    item = data[0]
    assert item["frames"].shape == (3, 3, 15, 15) and item["frames"].abs().max() <= 1
    assert set(item["conditions"]) == {"actions", "label"}


def test_a_set_whose_folder_is_a_number(prepared, tmp_path, monkeypatch):
    shutil.copytree(prepared, tmp_path / "2024")
    monkeypatch.chdir(tmp_path)
    assert len(PreparedVideos(2024, "train", 3)) == len(prepared_videos(2024, "train", 3)) > 0


def test_stride_takes_frames_and_conditions_alike(prepared):
    data = PreparedVideos(prepared, "train", 4, frame_stride=3)
    assert [v.name for v in data.videos] == ["train-1"] and data.fps == 5 / 3
    source = noise("train", "train-1")
    frames = data.read_video(0, 1, 4)
    assert torch.equal(((frames + 1) * 127.5).round().to(torch.uint8), source[3:10:3])
    assert torch.equal(data.read_conditions(0, 1, 4)["actions"], actions(source)[3:10:3])


@pytest.mark.parametrize("flip, axes", [("horizontal", [3]), ("vertical", [2]), ("both", [2, 3])])
def test_clips_of_the_train_split_are_mirrored_every_other_time(prepared, flip, axes):
    plain, mirrored = prepared_videos(prepared, "train", 2), prepared_videos(prepared, "train", 2, flip=flip)
    seen = set()
    for epoch in range(12):
        plain.set_epoch(epoch), mirrored.set_epoch(epoch)
        for index in range(len(plain)):
            frames, found = plain[index], mirrored[index]
            assert torch.equal(frames["conditions"]["actions"], found["conditions"]["actions"])
            forms = [[axis for axis, on in zip((2, 3), chosen) if on] for chosen in itertools.product((0, 1), repeat=2)]
            (form,) = [form for form in forms if torch.equal(frames["frames"].flip(form), found["frames"])]
            seen.add(tuple(form))
            assert torch.equal(found["frames"], mirrored[index]["frames"])  # the same for each worker
    assert seen == {tuple(c) for n in range(len(axes) + 1) for c in itertools.combinations(axes, n)}
    # Whole videos, and other splits, are left as they are.
    assert (
        torch.equal(plain.read_video(0, 0, 3), mirrored.read_video(0, 0, 3)) and plain.describe() == mirrored.describe()
    )
    test = prepared_videos(prepared, "test", 2, flip=flip)
    assert all(
        torch.equal(one["frames"], two["frames"]) for one, two in zip(test, prepared_videos(prepared, "test", 2))
    )
    with pytest.raises(ValueError, match="flip: expected horizontal, vertical, both or null, found 'left'"):
        prepared_videos(prepared, "train", 2, flip="left")


def test_channels_are_converted(prepared):
    colour, grey = PreparedVideos(prepared, "test", 4), PreparedVideos(prepared, "test", 4, channels=1)
    weights = torch.tensor([0.299, 0.587, 0.114]).view(3, 1, 1)
    assert torch.allclose(grey[0]["frames"], (colour[0]["frames"] * weights).sum(1, keepdim=True), atol=1e-5)


@pytest.mark.parametrize("n_workers", [0, 2])
def test_batches_carry_conditions_whatever_the_workers(prepared, n_workers):
    data = PreparedVideos(prepared, "train", 3)
    start = "forkserver" if n_workers else None
    batch = next(iter(DataLoader(data, batch_size=4, num_workers=n_workers, multiprocessing_context=start)))
    assert torch.equal(batch["frames"], torch.stack([data[i]["frames"] for i in range(4)]))
    assert batch["conditions"]["actions"].shape == (4, 3, 4)
    assert batch["conditions"]["label"].tolist() == [0, 1, 1, 1]


def test_the_manifest_says_what_the_set_is(prepared):
    manifest = json.loads((prepared / "manifest.json").read_text())
    assert manifest["name"] == "noise" and manifest["protocol"] == {"split": "standard"}
    assert manifest["counts"] == {"train": 5, "test": 2} and manifest["complete"]
    assert (manifest["frame_size"], manifest["channels"], manifest["fps"]) == ([15, 15], 3, 5.0)
    assert manifest["conditions"] == Noise.conditions
    assert set(manifest["sha256"]) == set(manifest["source_sha256"]) == {"train", "test"}


def test_shards_are_plain_safetensors(prepared):
    with safe_open(prepared / "train" / "shard-00001.safetensors", framework="pt") as file:
        assert torch.equal(file.get_tensor("00000002"), noise("train", "train-2"))
        assert file.get_tensor("00000003.label") == 3


def test_processes_write_the_same_files(prepared, tmp_path):
    prepare(Noise(), tmp_path / "set", workers=2)
    assert contents(tmp_path / "set") == contents(prepared)


def prepare_until_killed(root):
    prepare(Noise(kill_at="train-4"), root)


def test_kill_and_resume_equals_an_uninterrupted_run(prepared, tmp_path):
    root = tmp_path / "set"
    process = multiprocessing.get_context("spawn").Process(target=prepare_until_killed, args=(root,))
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    kept = (root / "train/shard-00000.safetensors").stat().st_mtime_ns
    with pytest.raises(FileNotFoundError, match=r"no finished set here; run tools/prepare_dataset.py noise --output"):
        PreparedVideos(root, "train", 3, name="noise")
    prepare(Noise(), root)
    assert (root / "train/shard-00000.safetensors").stat().st_mtime_ns == kept
    assert contents(root) == contents(prepared)


def test_unreadable_videos_end_in_one_line_and_a_re_run_mends_them(prepared, tmp_path, caplog):
    root = tmp_path / "set"
    with pytest.raises(
        IncompleteError,
        match=r"expected videos: train 5; found: train 4; 1 could not be read, first: train-2.avi: .*--partial",
    ):
        prepare(Noise(missing=["train-2"]), root)
    assert "skipped: train-2.avi" in caplog.text
    kept = (root / "train/shard-00000.safetensors").stat().st_mtime_ns
    prepare(Noise(missing=["train-2"]), root, partial=True)
    manifest = json.loads((root / "manifest.json").read_text())
    assert manifest["counts"]["train"] == 4 and not manifest["complete"]
    assert [v.name for v in PreparedVideos(root, "train", 1).videos] == ["train-0", "train-1", "train-3", "train-4"]
    prepare(Noise(), root)
    assert contents(root) == contents(prepared)
    assert (root / "train/shard-00000.safetensors").stat().st_mtime_ns == kept


def test_a_set_that_was_accepted_in_part_only_gains_by_a_re_run(prepared, tmp_path):
    root = tmp_path / "set"
    prepare(Noise(missing=["train-2", "train-4"]), root, partial=True)
    before = contents(root)
    with pytest.raises(IncompleteError, match="expected videos: train 5; found: train 3"):  # train-3 is gone by now
        prepare(Noise(missing=["train-2", "train-3", "train-4"]), root)
    assert contents(root) == before
    with pytest.raises(IncompleteError, match="expected videos: train 5; found: train 4"):
        prepare(Noise(missing=["train-4"]), root)
    assert [v.name for v in PreparedVideos(root, "train", 1).videos] == ["train-0", "train-1", "train-2", "train-3"]
    prepare(Noise(), root)
    assert contents(root) == contents(prepared)


def test_a_split_without_a_readable_video_is_left_out_of_a_partial_set(tmp_path):
    figures = prepare(Noise(missing=["test-0", "test-1"]), tmp_path / "set", partial=True)
    assert figures["counts"] == {"train": 5} and figures["skipped"] == {"train": 0, "test": 2}
    with pytest.raises(EmptySplitError, match="noise has no split 'test'; it has train"):
        PreparedVideos(tmp_path / "set", "test", 1)
    assert not check_folder(tmp_path / "set")["problems"]


def test_more_videos_than_published_do_not_hide_one_that_is_skipped(tmp_path, monkeypatch):
    monkeypatch.setattr(Noise, "expected_counts", lambda self: {"train": 4})
    with pytest.raises(IncompleteError, match="expected videos: train 4; found: train 4; 1 could not be read, first"):
        prepare(Noise(missing=["train-2"]), tmp_path / "set")


class Slow(Noise):
    def read(self, split, name):
        Path(os.environ["SLOW_PIDS"], str(os.getpid())).touch()
        time.sleep(60)


def test_workers_end_with_a_killed_run(tmp_path, monkeypatch):
    pids = tmp_path / "pids"
    pids.mkdir()
    monkeypatch.setenv("SLOW_PIDS", str(pids))
    run = multiprocessing.get_context("spawn").Process(
        target=prepare, args=(Slow(), tmp_path / "set"), kwargs={"workers": 2}
    )
    run.start()
    wait_until(lambda: len(list(pids.iterdir())) == 2)
    run.kill()
    wait_until(lambda: not any(runs(path.name) for path in pids.iterdir()))


def wait_until(condition, seconds=280):  # two processes that import torch one after the other, on a busy machine
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.1)


def runs(pid):
    """Whether a process does; one that has ended may have to wait until another takes note of it."""
    try:
        return Path("/proc", pid, "stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


class Deadly(Noise):
    """Of which two videos end the process that reads them, in the middle of a shard and alone in one."""

    def read(self, split, name):
        if name in ("train-1", "train-4"):
            os.kill(os.getpid(), signal.SIGSEGV if name == "train-1" else signal.SIGKILL)
        return super().read(split, name)


def test_a_video_that_ends_its_process_is_named_and_left_out(prepared, tmp_path, caplog):
    root = tmp_path / "set"
    figures = prepare(Deadly(), root, workers=2, partial=True)
    assert figures["counts"] == {"train": 3, "test": 2} and figures["skipped"] == {"train": 2, "test": 0}
    assert "skipped: train-1: the process that read it was lost (Segmentation fault; out of memory" in caplog.text
    assert "skipped: train-4: the process that read it was lost (Killed; out of memory" in caplog.text
    assert [v.name for v in PreparedVideos(root, "train", 1).videos] == ["train-0", "train-2", "train-3"]
    prepare(Noise(), root)
    assert contents(root) == contents(prepared)


def test_another_protocol_is_refused(prepared):
    before = contents(prepared)
    with pytest.raises(
        ValueError, match=r"made with protocol.split standard, asked for other; prepare it into another"
    ):
        prepare(Noise(protocol="other"), prepared)
    assert contents(prepared) == before


def test_a_full_disk_keeps_finished_shards(tmp_path):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (8 * 1024, limits[1]))
    try:
        with pytest.raises(OSError, match=r"shard-0000\d.safetensors: cannot be written .*; finished shards are kept"):
            prepare(Noise(), tmp_path / "set")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert not list((tmp_path / "set").rglob("*.tmp"))


def test_requests_that_do_not_fit_are_refused(prepared):
    with pytest.raises(ValueError, match="expected the set bair, found noise"):
        PreparedVideos(prepared, "train", 3, name="bair")
    with pytest.raises(ValueError, match=r"holds frames of 15 pixels, asked for 64: set frame_size=15"):
        PreparedVideos(prepared, "train", 3, size=64)
    with pytest.raises(EmptySplitError, match="noise has no split 'val'; it has train, test"):
        PreparedVideos(prepared, "val", 3)
    with pytest.raises(EmptySplitError, match=r"no video has clip_length=13 frames .* the longest of 5 has 12"):
        PreparedVideos(prepared, "train", 13)


def test_check_names_what_is_wrong(prepared, tmp_path):
    figures = check_folder(prepared, clip_length=4)
    assert figures["problems"] == ["train: train-3: 3 frames are fewer than clip_length=4"]
    assert figures["counts"] == {"train": 5, "test": 2} and figures["frames"] == 50
    root = tmp_path / "set"
    prepare(Noise(), root)
    shard = root / "train/shard-00002.safetensors"
    damaged = bytearray(shard.read_bytes())
    damaged[-200] ^= 1
    shard.write_bytes(damaged)
    (problem,) = check_folder(root)["problems"]
    assert problem.startswith(f"{shard}: expected sha256") and "delete it and re-run" in problem
    damaged[10] = 255
    shard.write_bytes(damaged)
    assert len(check_folder(root)["problems"]) == 1
    with pytest.raises(ValueError, match=r"shard-00002.safetensors: not a readable safetensors file .*; delete it"):
        PreparedVideos(root, "train", 1).read_video(4, 0, 1)
    (root / "train/manifest.json").unlink()
    (problem,) = check_folder(root)["problems"]
    assert problem == f"{root / 'train'}: unfinished or gone; re-run tools/prepare_dataset.py"


def test_check_finds_equal_videos(tmp_path):
    prepare(Noise(twin={"train-2": "train-1"}), tmp_path / "set")
    assert check_folder(tmp_path / "set")["problems"] == ["train: train-2: the same frames as train: train-1"]


def test_conditions_reach_the_latents_cache(tmp_path):
    prepare(Noise(), tmp_path / "set")
    data = PreparedVideos(tmp_path / "set", "train", 3, channels=3)
    tokenizer = PixelTokenizer(3, 15, 15, levels=None)
    encode_dataset(data, tokenizer, tmp_path / "cache", batch_frames=4, shard_videos=3)
    cached = LatentCacheDataset(tmp_path / "cache", 3)
    assert cached.conditions == Noise.conditions
    for index, video in enumerate(cached.videos):
        found = cached.read_conditions(index, 1, 3)
        assert torch.equal(found["actions"], actions(noise("train", video.name))[1:3]) and found["label"] == index
    assert cached[0]["conditions"]["actions"].shape == (3, 4)


def test_a_model_without_its_conditions_is_refused():
    needed = {"actions": {"shape": [3], "dtype": "float32", "per": "frame"}}
    match_conditions({}, "Prior", Noise.conditions, "the data set")
    match_conditions(Noise.conditions, "Prior", Noise.conditions, "the data set")
    with pytest.raises(ValueError, match=r"conditions: Prior needs actions .*\[3\].*, noise has actions .*\[4\]"):
        match_conditions(needed, "Prior", Noise.conditions, "noise")
    with pytest.raises(ValueError, match=r"conditions: Prior needs actions .*, noise has no conditions"):
        match_conditions(needed, "Prior", {}, "noise")
