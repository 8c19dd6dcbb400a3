"""VideoFolder over real files: the index, splits, windows, rates, damage, workers, memory."""

import argparse
import json
import logging
import multiprocessing
import os
import re
import shutil
import time

import psutil
import pytest
import torch
from torch.utils.data import DataLoader
from video_files import counter_frames, encode, read_counter

from latentcast import VideoFolder, instantiate, load_config, probe, read_clip
from latentcast.cli import run_tool
from latentcast.data.base import EmptySplitError, VideoDataset
from latentcast.data.loading import open_loader
from latentcast.data.video import folder as module
from latentcast.data.video.folder import splits_of
from latentcast.data.video.reader import VideoError, neat_rate

GOOD = ["a.mp4", "b.mkv", "deep/c.avi", "deep/d.webm", "deep/er/e.gif", "deep/er/f.MOV"]
ALL_TRAIN = {"val_fraction": 0.0, "test_fraction": 0.0}


def open_folder(root, split="train", clip_length=8, size=48, **kwargs):
    return VideoFolder(root, split, clip_length, size, **(ALL_TRAIN | kwargs))


@pytest.fixture(scope="module")
def wide(tmp_path_factory):
    """Three square videos of 24, 40 and 60 frames: nothing is cut away, so every frame tells its number."""
    root = tmp_path_factory.mktemp("wide")
    for name, n_frames in (("x.mp4", 24), ("y.mp4", 40), ("z.mp4", 60)):
        encode(root / name, counter_frames(n_frames, 64, 64))
    return root


def fresh_copy(video_folder, target):
    return shutil.copytree(video_folder, target, ignore=shutil.ignore_patterns(".*"))


def shown(frames):
    return read_counter(frames.repeat(1, 3 // frames.shape[1], 1, 1))


def test_finds_every_kind_and_names_what_it_skips(video_folder, tmp_path, caplog):
    caplog.set_level(logging.DEBUG, "latentcast")
    video_folder = fresh_copy(video_folder, tmp_path / "videos")
    dataset = open_folder(video_folder)
    assert isinstance(dataset, VideoDataset)
    assert [(v.name, v.n_frames) for v in dataset.videos] == list(zip(GOOD, (24, 26, 28, 30, 32, 34)))
    assert all(v.fps == pytest.approx(25) for v in dataset.videos) and dataset.fps == pytest.approx(25)
    assert "left out 2 damaged: cut.mp4 (not a readable video" in caplog.text and "text.mp4 (" in caplog.text
    counts = "left out 2 damaged; 1 shorter than clip_length=8 (5 frames): short.mp4 (5)"
    assert "notes.txt" not in caplog.text and f"train: 6 of 9 files; {counts}" in caplog.text
    caplog.clear()
    open_folder(video_folder)  # what is a matter of the files is said once, what is one of the settings again
    assert [record.message for record in caplog.records if record.levelno > logging.DEBUG] == [
        f"{video_folder}: train: 6 of 9 files; {counts}"
    ]
    assert len(dataset) == 3 + 3 + 3 + 3 + 4 + 4
    for item in dataset:
        assert item["frames"].shape == (8, 3, 48, 48) and item["frames"].dtype == torch.float32
        assert -1 <= item["frames"].min() < -0.8 and 0.8 < item["frames"].max() <= 1


def test_index_is_built_once_and_follows_changes(video_folder, tmp_path, capsys):
    root = fresh_copy(video_folder, tmp_path / "videos")
    open_folder(root)
    assert "indexing videos: 100%" in capsys.readouterr().err.replace("\r", "\n")
    index = root / ".latentcast-index.json"
    before = json.loads(index.read_text())["files"]
    stamp = index.stat().st_mtime_ns
    open_folder(root)
    assert "indexing" not in capsys.readouterr().err and index.stat().st_mtime_ns == stamp

    encode(root / "new.mp4", counter_frames(9))
    encode(root / "text.mp4", counter_frames(11))  # mended
    os.utime(root / "text.mp4", ns=(1, 1))
    (root / "a.mp4").unlink()
    names = {v.name: v.n_frames for v in open_folder(root).videos}
    assert "2 of 2 files" in capsys.readouterr().err
    assert (names["new.mp4"], names["text.mp4"]) == (9, 11) and "a.mp4" not in names
    after = json.loads(index.read_text())["files"]
    assert after["b.mkv"] == before["b.mkv"]

    older = {
        name: {"size": entry["size"], "mtime": entry["mtime"], "error": "damaged"} for name, entry in after.items()
    }
    for content in ("{ broken", json.dumps({"format": 1, "files": older})):
        index.write_text(content)
        assert {v.name for v in open_folder(root).videos} == set(names)


def test_index_elsewhere(video_folder, tmp_path, monkeypatch):
    root = fresh_copy(video_folder, tmp_path / "videos")
    open_folder(root, index_dir=tmp_path / "index")
    assert len(list((tmp_path / "index").glob("*.json"))) == 1
    monkeypatch.setattr(module.os, "access", lambda *_: False)  # as for a read-only folder, also when run by root
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    open_folder(root)
    assert len(list((tmp_path / "cache" / "latentcast" / "indices").glob("*.json"))) == 1
    assert not [p for p in root.iterdir() if p.name.startswith(".")]


def _count(arguments):
    root, barrier = arguments
    barrier.wait()
    return [v.n_frames for v in open_folder(root).videos]


def test_processes_that_index_at_once_agree(video_folder, tmp_path):
    root = fresh_copy(video_folder, tmp_path / "videos")
    context = multiprocessing.get_context("forkserver")
    with context.Manager() as manager, context.Pool(3) as pool:
        barrier = manager.Barrier(3)
        assert pool.map(_count, [(root, barrier)] * 3, chunksize=1) == [[24, 26, 28, 30, 32, 34]] * 3
    assert sorted(p.name for p in root.iterdir() if p.name.startswith(".")) == [
        ".latentcast-index.json",
        ".latentcast-index.lock",
    ]


def test_split_is_a_partition_that_added_files_do_not_move(tmp_path):
    frames = counter_frames(4)
    for i in range(30):
        encode(tmp_path / f"{i:02d}.mp4", frames)
    sizes = {"val_fraction": 0.2, "test_fraction": 0.3, "clip_length": 4}

    def splits():
        return {s: {v.name for v in open_folder(tmp_path, s, **sizes).videos} for s in ("train", "val", "test")}

    before = splits()
    assert sorted(name for names in before.values() for name in names) == [f"{i:02d}.mp4" for i in range(30)]
    assert 5 < len(before["test"]) < 14 and 2 < len(before["val"]) < 11
    assert {v.name for v in open_folder(tmp_path, "val", seed=1, **sizes).videos} != before["val"]
    for i in range(30, 40):
        encode(tmp_path / f"{i:02d}.mp4", frames)
    assert all(before[split] <= after for split, after in splits().items())


@pytest.mark.parametrize("n_videos", range(3, 12))
def test_few_videos_have_one_at_least_in_each_split_that_has_a_share(n_videos):
    moved = 0
    for seed in range(30):
        names = [f"{seed} {number}" for number in range(n_videos)]
        splits = splits_of(names, 0.1, 0.1)
        assert {*splits.values()} == {"train", "val", "test"}
        assert {*splits_of(names, 0.1, 0).values()} == {"train", "val"} and {*splits_of(names, 0, 0).values()} == {
            "train"
        }
        more = splits_of([*names, "one more"], 0.1, 0.1)
        moved += sum(more[name] != split for name, split in splits.items())
        # None that was trained on is held out later.
        assert all(more[name] == "train" for name, split in splits.items() if split == "train")
    assert moved < 30
    assert {*splits_of(names[:2], 0.1, 0.1).values()} == {"train"}


def test_what_helps_an_empty_split_does(tmp_path):
    for name, n_frames in (("a.mp4", 12), ("b.mp4", 12), ("c.mp4", 4), ("d.mp4", 4)):
        encode(tmp_path / name, counter_frames(n_frames))
    for seed in range(100):
        arguments = {"clip_length": 8, "val_fraction": 0.1, "seed": seed}
        try:
            open_folder(tmp_path, "val", **arguments)
        except EmptySplitError as error:  # the one file there is too short
            message = str(error)
            share = re.search(
                r"shorter clips \(clip_length=4 at most\) or data\.val_fraction=(0\.\d+) or folders", message
            )
            assert share and "1 shorter than clip_length=8 (4 frames): " in message
            split = open_folder(tmp_path, "val", **arguments | {"val_fraction": float(share[1])})
            assert (
                len(split.videos) == 1 and open_folder(tmp_path, **arguments | {"val_fraction": float(share[1])}).videos
            )
            break
    else:
        pytest.fail("no empty split was met")


def test_folders_named_after_splits_are_the_splits(tmp_path):
    for i, split in enumerate(("train", "val", "test")):
        (tmp_path / split).mkdir()
        encode(tmp_path / split / "a.mp4", counter_frames(8 + i))
    for i, split in enumerate(("train", "val", "test")):
        assert [(v.name, v.n_frames) for v in VideoFolder(tmp_path, split, 8, 16).videos] == [(f"{split}/a.mp4", 8 + i)]


@pytest.mark.parametrize("missing", ["val", "test"])
def test_a_split_without_a_folder_takes_its_share_of_train(tmp_path, missing):
    other = {"val": "test", "test": "val"}[missing]
    frames, sizes = counter_frames(4), {"clip_length": 4, f"{missing}_fraction": 0.3, f"{other}_fraction": 0.5}
    for folder, n_files in (("train", 20), (other, 4), ("elsewhere", 1)):
        (tmp_path / folder).mkdir()
        for i in range(n_files):
            encode(tmp_path / folder / f"{i:02d}.mp4", frames)

    def names(split, **kwargs):
        return {v.name for v in open_folder(tmp_path, split, **(sizes | kwargs)).videos}

    assert names(other) == {f"{other}/{i:02d}.mp4" for i in range(4)}
    assert 1 < len(names(missing)) < 12
    assert names("train") | names(missing) == {f"train/{i:02d}.mp4" for i in range(20)}
    assert not names("train") & names(missing)
    assert len(names("train", **{f"{missing}_fraction": 0.0})) == 20
    with pytest.raises(
        EmptySplitError, match=f"What helps: data.{missing}_fraction=0.01 or folders train and {missing}"
    ):
        names(missing, **{f"{missing}_fraction": 0.0})


def test_split_folders_without_train_are_refused(tmp_path):
    for folder in ("val", "test"):
        (tmp_path / folder).mkdir()
        encode(tmp_path / folder / "a.mp4", counter_frames(8))
    for split in ("train", "val", "test"):
        with pytest.raises(ValueError, match=r"expected a folder train beside val and test, found none$"):
            open_folder(tmp_path, split)


def test_train_alone_is_a_folder_like_any_other(tmp_path):
    for folder in ("car", "train"):
        (tmp_path / folder).mkdir()
        encode(tmp_path / folder / "a.mp4", counter_frames(8))
    assert [v.name for v in open_folder(tmp_path).videos] == ["car/a.mp4", "train/a.mp4"]


def test_a_folder_whose_name_is_a_number(tmp_path, monkeypatch):
    (tmp_path / "2024").mkdir()
    encode(tmp_path / "2024" / "a.mp4", counter_frames(8))
    monkeypatch.chdir(tmp_path)
    overrides = [f"data.{key}" for key in ("root=2024", "index_dir=7", "val_fraction=0", "test_fraction=0")]
    dataset = instantiate(load_config("video_folder", [*overrides, "clip_length=8"]).data)(split="train")
    assert [v.n_frames for v in dataset.videos] == [8] and len(list((tmp_path / "7").glob("2024-*.json"))) == 1


def test_no_usable_video_is_an_error_that_counts(video_folder, tmp_path):
    with pytest.raises(EmptySplitError) as caught:
        open_folder(video_folder, clip_length=100)
    message = str(caught.value)
    assert "'train': of 9 files, 2 damaged: cut.mp4 (not a" in message and "7 shorter than clip_length=100" in message
    assert "f.MOV (34), " in message and "\n" not in message
    assert message.endswith("0 in other splits. What helps: shorter clips (clip_length=34 at most) or more files")
    assert "7 shorter than clip_length=100 (5 to 34 frames): " in message
    with pytest.raises(EmptySplitError, match=r"9 in other splits\. What helps: data\.val_fraction=0\.01 or folders"):
        open_folder(video_folder, "val")
    with pytest.raises(EmptySplitError, match=r"no video files here; expected any of \.mp4"):
        open_folder(tmp_path)
    with pytest.raises(FileNotFoundError, match="nowhere: no such folder"):
        open_folder(tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"clip_length": 0}, "clip_length: expected at least 1"),
        ({"frame_stride": 0}, "frame_stride"),
        ({"channels": 2}, "channels: expected 1"),
        ({"fps": -1.0}, "fps"),
        ({"fps": 5.0, "frame_stride": 2}, "frame_stride=1"),
        ({"val_fraction": 0.7, "test_fraction": 0.7}, "val_fraction"),
        ({"split": "dev"}, "split: expected one of"),
        ({"size": -3}, "size"),
    ],
)
def test_bad_arguments(wide, arguments, message):
    with pytest.raises(ValueError, match=message):
        open_folder(wide, **arguments)


@pytest.mark.parametrize(
    "override, message",
    [
        ("data.fps=-1", r"^data\.fps: expected a rate above 0"),
        ("data.val_fraction=2", r"^data\.val_fraction, data\.test_fraction: not shares"),
        ("frame_size=0", r"^frame_size: expected pixels, a whole number from 1 on or \[height, width\], found 0"),
        ("clip_length=0", r"^clip_length: expected at least 1"),
    ],
)
def test_errors_name_the_keys_of_the_config(wide, override, message):
    with pytest.raises(ValueError, match=message):
        instantiate(load_config("video_folder", [f"data.root={wide}", override]).data)(split="train")


def test_clips_to_show_are_of_as_many_videos_as_can_be(wide):
    dataset = open_folder(wide, clip_length=10, size=64)  # 2, 4 and 6 clips
    assert dataset.spread(2) == [0, 2] and dataset.spread(5) == [0, 2, 6, 1, 3]
    assert sorted(dataset.spread(99)) == list(range(12))


def test_windows_are_random_in_train_and_fixed_elsewhere(wide):
    train = open_folder(wide, clip_length=10, size=64)
    assert len(train) == 2 + 4 + 6
    starts = []
    for epoch in range(12):
        train.set_epoch(epoch)
        first = [shown(item["frames"]) for item in train]
        assert first == [shown(item["frames"]) for item in train]
        for window in first:
            assert window == list(range(window[0], window[0] + 10))
        starts.append([window[0] for window in first])
    assert len(set(map(tuple, starts))) == 12
    longest = {start for epoch in starts for start in epoch[6:]}
    assert min(longest) < 10 and max(longest) > 40 and max(s for e in starts for s in e[:2]) <= 14
    val = open_folder(wide, "val", clip_length=10, size=64, val_fraction=1.0)
    for epoch in range(2):
        val.set_epoch(epoch)
        expected = [10 * k for n in (24, 40, 60) for k in range(n // 10)]
        assert [shown(item["frames"])[0] for item in val] == expected


def test_stride_and_reading_in_pieces(wide):
    dataset = open_folder(wide, clip_length=5, size=64, frame_stride=3)
    assert [v.n_frames for v in dataset.videos] == [8, 14, 20] and dataset.fps == pytest.approx(25 / 3)
    assert shown(dataset.read_video(1, 0, 14)) == list(range(0, 40, 3))
    pieces = torch.cat([dataset.read_video(2, s, min(s + 7, 20)) for s in range(0, 20, 7)])
    assert torch.equal(pieces, dataset.read_video(2, 0, 20))
    window = shown(dataset[0]["frames"])
    assert window == list(range(window[0], window[0] + 13, 3))
    with pytest.raises(ValueError, match=r"z\.mp4: expected 0 <= start < stop <= 20"):
        dataset.read_video(2, 18, 21)


def test_target_rate(tmp_path):
    encode(tmp_path / "a25.mp4", counter_frames(50, 64, 64), fps=25)
    encode(tmp_path / "b10.mp4", counter_frames(20, 64, 64), fps=10)
    pts = [0, 1, 2, 3, 10, 11, 12, 19]  # tenths of a second
    encode(tmp_path / "c.mkv", counter_frames(8, 64, 64), fps=10, pts=pts)
    dataset = open_folder(tmp_path, clip_length=4, size=64, fps=10)
    assert dataset.fps == 10 and [v.n_frames for v in dataset.videos] == [20, 20, 20]
    assert shown(dataset.read_video(0, 0, 20)) == pytest.approx([2.5 * i for i in range(20)], abs=0.5)
    assert shown(dataset.read_video(1, 0, 20)) == list(range(20))
    nearest = [min(range(8), key=lambda i: abs(pts[i] - t)) for t in range(20)]
    assert shown(dataset.read_video(2, 0, 20)) == nearest


def test_videos_of_different_rates_train_at_one(tmp_path, caplog):
    encode(tmp_path / "a25.mp4", counter_frames(50, 64, 64), fps=25)
    for name in ("b10.mp4", "c10.mp4"):
        encode(tmp_path / name, counter_frames(20, 64, 64), fps=10)
    dataset = open_folder(tmp_path, clip_length=4, size=64)
    assert dataset.fps == 10 and [v.n_frames for v in dataset.videos] == [20, 20, 20]
    assert dataset.describe()["fps"] == 10
    assert shown(dataset.read_video(0, 0, 20)) == pytest.approx([2.5 * i for i in range(20)], abs=0.5)
    said = "all are read at 10 frames a second, as 2 of 3 are; data.fps=RATE chooses another; the others: a25.mp4 (25)"
    assert said in caplog.text
    strided = open_folder(tmp_path, clip_length=4, size=64, frame_stride=2)
    assert strided.fps == 5 and shown(strided.read_video(1, 0, 10)) == list(range(0, 20, 2))
    (tmp_path / "a25.mp4").unlink()
    alike = open_folder(tmp_path, clip_length=4, size=64)
    assert alike.fps == 10 and alike.describe()["fps"] is None


def test_the_rate_is_the_same_for_every_split(tmp_path):
    """Whatever rates a split's own videos have."""
    for split, rates in (("train", (10, 10, 25)), ("val", (25,)), ("test", (25, 25))):
        (tmp_path / split).mkdir()
        for number, fps in enumerate(rates):
            encode(tmp_path / split / f"{number}.mp4", counter_frames(30, 64, 64), fps=fps)
    assert {VideoFolder(tmp_path, split, 4, 64).fps for split in ("train", "val", "test")} == {25}


def test_rates_have_no_last_digits(wide):
    assert neat_rate(24.999999999999996) == 25 and neat_rate(30000 / 1001) == 30000 / 1001
    assert neat_rate(29.97002997 / 3) == 10000 / 1001 and neat_rate(0.0123456) == 0.0123456
    assert [video.fps for video in open_folder(wide, clip_length=5, size=64).videos] == [25, 25, 25]


@pytest.mark.parametrize("names", [["0001.png", "0002.png"], ["me.jpg", "you.JPEG"]])
def test_a_folder_of_pictures_is_told_what_makes_videos_of_them(tmp_path, names):
    (tmp_path / "walk").mkdir()
    for name in names:
        (tmp_path / "walk" / name).touch()
    hint = (
        r"no video files here, but 2 pictures: numbered ones become videos by tools/prepare_dataset.py folder --source "
    )
    with pytest.raises(EmptySplitError, match=hint):
        open_folder(tmp_path)


def test_grey_is_luma(wide):
    rgb = open_folder(wide, size=32).read_video(0, 0, 4)
    grey = open_folder(wide, size=32, channels=1).read_video(0, 0, 4)
    assert grey.shape == (4, 1, 32, 32)
    assert torch.allclose(grey[:, 0], 0.299 * rgb[:, 0] + 0.587 * rgb[:, 1] + 0.114 * rgb[:, 2], atol=1e-5)


@pytest.mark.parametrize(("n_workers", "start"), [(2, "forkserver"), (1, "spawn")])
def test_workers_give_the_same_clips(video_folder, n_workers, start):
    dataset = open_folder(video_folder, size=16)
    dataset.set_epoch(3)
    alone = torch.stack([item["frames"] for item in dataset])
    loader = DataLoader(dataset, batch_size=4, num_workers=n_workers, multiprocessing_context=start)
    assert torch.equal(torch.cat([batch["frames"] for batch in loader]), alone)


def test_file_damaged_after_indexing_is_named(tmp_path):
    for name in ("a.mp4", "b.mp4"):
        encode(tmp_path / name, counter_frames(20))
    dataset = open_folder(tmp_path)
    (tmp_path / "b.mp4").write_bytes((tmp_path / "b.mp4").read_bytes()[:900])
    with pytest.raises(VideoError, match=r"b\.mp4: not a readable video"):
        dataset.read_video(1, 0, 8)


def test_damage_met_by_a_worker_is_one_line_of_a_tool(tmp_path, capsys):
    encode(tmp_path / "a.mp4", counter_frames(20))
    dataset = open_folder(tmp_path)
    (tmp_path / "a.mp4").write_bytes(b"nothing left")
    with pytest.raises(SystemExit) as caught:
        run_tool(lambda _: list(open_loader(dataset, num_workers=1)), argparse.ArgumentParser(), [])
    line = f"error: {tmp_path / 'a.mp4'}: not a readable video (Invalid data found when processing input)"
    assert caught.value.code == 1 and capsys.readouterr().err.splitlines()[-1] == line


def test_describe(video_folder, tmp_path):
    same = fresh_copy(video_folder, tmp_path / "elsewhere")
    description = open_folder(video_folder).describe()
    assert json.loads(json.dumps(description)) == description == open_folder(same).describe()
    for change in ({"size": 32}, {"channels": 1}, {"frame_stride": 2}, {"fps": 20}, {"seed": 1}, {"clip_length": 27}):
        assert open_folder(same, **change).describe() != description
    encode(same / "more.mp4", counter_frames(12))
    assert open_folder(same).describe() != description


def test_memory_stays_flat(tmp_path):
    for i in range(3):
        encode(tmp_path / f"{i}.mp4", counter_frames(20, 240, 320))
    dataset = open_folder(tmp_path, clip_length=8, size=64)
    process, used = psutil.Process(), []
    for round_ in range(4):
        for epoch in range(25):
            dataset.set_epoch(25 * round_ + epoch)
            for index in range(len(dataset)):
                dataset[index]
        used.append(process.memory_info().rss / 2**20)
    # A leaked decoder or clip (8 frames of 240x320) is 1.8 MiB, 270 MiB in the last 150 clips.
    assert used[-1] - used[1] < 40, used
    assert len(process.open_files()) < 20


def test_long_video_is_read_by_seeking(tmp_path):
    frames = counter_frames(250, 64, 64)
    path = encode(tmp_path / "long.mp4", torch.from_numpy(frames).repeat(8, 1, 1, 1).numpy())

    info = probe(path)

    def cpu_seconds(indices, backend):
        start = time.process_time()
        assert read_counter(read_clip(path, indices, backend=backend, info=info)) == [i % 250 for i in indices]
        return time.process_time() - start

    from_start = min(cpu_seconds([0, 1995], "pyav") for _ in range(3))  # a window so wide is decoded from its start
    for backend in ("pyav", "decord"):
        assert min(cpu_seconds([1990, 1995], backend) for _ in range(3)) < from_start, backend
