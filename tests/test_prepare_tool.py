"""tools/prepare_dataset.py from the command line, and training on what it leaves."""

import contextlib
import functools
import json
import os
import re
import resource
import shutil
import subprocess
import sys

import pytest
from noise_benchmark import Noise
from PIL import Image
from tiny_experiment import TOOLS, call_tool
from video_files import counter_frames, cut_off, encode

from latentcast import LatentCacheDataset, PixelTokenizer, VideoFolder
from latentcast.data.sets import BENCHMARKS
from latentcast.data.sets.folder import Folder
from latentcast.data.store.encoding import encode_dataset
from latentcast.data.store.prepared import prepare


@pytest.fixture
def prepare_dataset(command):
    """-> (exit status, figures or None, stderr)"""
    return functools.partial(command, "prepare_dataset")


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    folder = tmp_path_factory.mktemp("source")
    for split, first, n_videos in (("train", 0, 3), ("val", 80, 1), ("test", 120, 1)):
        (folder / split).mkdir()
        for i in range(n_videos):
            encode(folder / split / f"{i}.mp4", counter_frames(10 + i, first=first + 20 * i))
    return folder


def test_a_set_is_prepared_checked_and_damaged(source, tmp_path, prepare_dataset):
    output = tmp_path / "set"
    options = "frame_size=16", "channels=1", "--workers", "2"  # which import the file of the process
    tool = [sys.executable, TOOLS / "prepare_dataset.py", "folder", "--source", source, "--output", output, *options]
    done = subprocess.run(tool, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    figures = json.loads(done.stdout.splitlines()[-1])
    assert figures["counts"] == {"train": 3, "val": 1, "test": 1} and figures["protocol"] == "folders"
    assert (output / "preview.png").is_file()
    status, figures, _ = prepare_dataset("check", output, "--clip-length", 10)
    assert (status, figures["problems"], figures["frames"]) == (0, [], 53)
    status, figures, err = prepare_dataset("check", output, "--clip-length", 11)
    assert status == 1 and len(figures["problems"]) == 3 and "0.mp4: 10 frames are fewer" in err


def test_a_damaged_source_ends_with_the_counts_and_goes_on_when_mended(source, tmp_path, prepare_dataset):
    damaged = tmp_path / "source"
    for split in ("train", "val", "test"):
        (damaged / split).mkdir(parents=True)
        (damaged / split / "a.mp4").write_bytes((source / split / "0.mp4").read_bytes())
    cut_off(source / "train/2.mp4", damaged / "train/b.mp4")
    arguments = "folder", "--source", damaged, "--output", tmp_path / "set", "--workers", 0
    status, figures, err = prepare_dataset(*arguments)
    assert status == 1 and figures is None
    assert "expected videos: train 2; found: train 1" in err and "b.mp4" in err.splitlines()[-1]
    (damaged / "train/b.mp4").write_bytes((source / "train/2.mp4").read_bytes())
    status, figures, _ = prepare_dataset(*arguments)
    assert status == 0 and figures["counts"]["train"] == 2


def test_check_of_any_folder_names_damaged_equal_and_short_files(source, tmp_path, prepare_dataset):
    for name in ("one.mp4", "two.mp4"):
        (tmp_path / name).write_bytes((source / "train/0.mp4").read_bytes())
    cut_off(source / "train/2.mp4", tmp_path / "cut.mp4")
    encode(tmp_path / "short.mp4", counter_frames(3))
    status, figures, _ = prepare_dataset("check", tmp_path, "--clip-length", 4)
    assert status == 1 and figures["counts"] == {"videos": 3}
    cut, short, twin = figures["problems"]
    assert cut.startswith("cut.mp4: ") and short == "short.mp4: 3 frames are fewer than clip_length=4"
    assert twin == "two.mp4: the same file as one.mp4"
    assert not (tmp_path / ".latentcast-index.json").exists()
    one = tmp_path / "one.mp4"
    times = one.stat()
    one.write_bytes(bytes(len(one.read_bytes())))
    os.utime(one, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert any(problem.startswith("one.mp4: ") for problem in prepare_dataset("check", tmp_path)[1]["problems"])


def test_thumbnails_beside_videos_are_no_video_and_odd_names_are_read(source, tmp_path, prepare_dataset):
    names = [*(f"clip{i}" for i in range(6)), "take: 2", "two\nlines", os.fsdecode(b"caf\xe9"), "x" * 251]
    root = tmp_path / "source"
    root.mkdir()
    for i, name in enumerate(names):
        encode(root / "a.mp4", counter_frames(8, first=8 * i)).rename(root / f"{name}.mp4")
        if i < 6:
            Image.fromarray(counter_frames(1)[0]).save(root / f"{name}.jpg")
    options = "--split", "hash", "fps=25", "val_fraction=0", "test_fraction=0", "--workers", 0
    status, figures, err = prepare_dataset("folder", "--source", root, "--output", tmp_path / "set", *options)
    assert status == 0, err
    assert figures["counts"] == {"train": 10} and "source: left out by suffix: 6 .jpg" in err
    stored = json.loads((tmp_path / "set/train/manifest.json").read_text())
    assert [video["name"] for video in stored["videos"]] == sorted(f"{name}.mp4" for name in names)


@contextlib.contextmanager
def no_free_descriptors(needed=True):
    """Whoever opens a file now learns that too many are open."""
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    if needed:
        resource.setrlimit(resource.RLIMIT_NOFILE, (3, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)


class Hindered(Folder):
    """A folder of which some videos cannot be reached, and others lead to an error that nobody thought of."""

    shard_videos = 1
    unreachable, surprising = ("b.mp4", "pictures"), ("c.mp4",)

    def read(self, split, name):
        if name in self.surprising:
            raise OverflowError("int too large")
        with no_free_descriptors(name in self.unreachable):
            return super().read(split, name)


class Reached(Hindered):
    unreachable = ()


def test_what_was_out_of_reach_is_tried_again(source, tmp_path):
    """Also by a run that accepts a set in part; what is wrong with a file is not."""
    root = tmp_path / "source"
    (root / "pictures").mkdir(parents=True)
    for name in ("a", "b", "c"):
        shutil.copy(source / "train/0.mp4", root / f"{name}.mp4")
    for i, frame in enumerate(counter_frames(5)):
        Image.fromarray(frame).save(root / "pictures" / f"{i}.png")
    options = {"val_fraction": 0.0, "test_fraction": 0.0, "fps": 25, "image_fps": 25}
    figures = prepare(Hindered(root, **options), tmp_path / "set", partial=True)
    assert (figures["counts"], figures["skipped"]) == ({"train": 1}, {"train": 3})
    shards = json.loads((tmp_path / "set/train/manifest.json").read_text())["shards"]
    assert [next(iter(shard["skipped"].values()), None) for shard in shards] == [
        None,
        f"{root}/b.mp4: Too many open files",
        "c.mp4: OverflowError: int too large",
        f"{root}/pictures: cannot be read at the moment (Too many open files)",
    ]
    written = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "set/train").glob("*.safetensors")}
    assert prepare(Hindered(root, **options), tmp_path / "set", partial=True)["counts"] == {"train": 1}
    assert prepare(Reached(root, **options), tmp_path / "set", partial=True)["counts"] == {"train": 3}
    again = {path.name for path in (tmp_path / "set/train").glob("*.safetensors")}
    again = {name for name in again if (tmp_path / "set/train" / name).stat().st_mtime_ns != written[name]}
    assert again == {"shard-00001.safetensors", "shard-00003.safetensors"}


def test_a_latents_cache_tries_again_what_was_out_of_reach(source, tmp_path):
    class Away(VideoFolder):
        away = True

        def read_video(self, index, start, stop):
            with no_free_descriptors(self.away and index == 1):
                return super().read_video(index, start, stop)

    dataset = Away(source, "train", 4, 16, backend="pyav")
    tokenizer = PixelTokenizer(3, 16, 16)
    figures = [encode_dataset(dataset, tokenizer, tmp_path / "cache", shard_videos=2) for _ in range(2)]
    dataset.away = False
    figures += [encode_dataset(dataset, tokenizer, tmp_path / "cache", shard_videos=2) for _ in range(2)]
    assert [(run["videos"], run["skipped"]) for run in figures] == [(2, 1), (2, 1), (3, 0), (3, 0)]
    assert figures[2]["frames_per_s"] and figures[3]["frames_per_s"] is None
    assert LatentCacheDataset(tmp_path / "cache", 4).videos[1].name == "train/1.mp4"


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["kit"], "no data set 'kit'; expected one of moving_mnist, smmnist, "),
        (["kth"], "--output: expected the folder to prepare into"),
        (["kth", "--output", "{tmp}/a"], "--source: kth is prepared from files"),
        (["kth", "--output", "{tmp}/a", "--source", "{tmp}/b"], "--source .*b: no such file or folder"),
        (["kth", "--output", "{tmp}/a", "--source", "{tmp}", "--split", "mine"], "--split: kth has svg, stdiff, offic"),
        (["flow", "--output", "{tmp}/a", "--workers", "-1"], "--workers: expected at least 0, found -1"),
        (["flow", "--output", "{tmp}/a", "tick=3"], "unknown argument 'tick'; did you mean 'ticks'"),
        (["flow", "--output", "{tmp}/a", "ticks"], "'ticks': expected an option as key=value"),
        (["check", "{tmp}/nothing"], "nothing: no such folder"),
        (["check"], "check: expected one folder, found 0 arguments"),
    ],
)
def test_mistakes_are_one_line(tmp_path, arguments, message, prepare_dataset):
    status, _, err = prepare_dataset(*(argument.format(tmp=tmp_path) for argument in arguments))
    assert status == 1 and re.search(f"^error: .*{message}", err) and len(err.splitlines()) == 1


def test_every_name_has_a_class_and_a_config():
    from latentcast.config import load_config
    from latentcast.targets import import_name

    for name, target in BENCHMARKS.items():
        assert import_name(target).name == name
        assert load_config("quickstart", [f"data={name}"]).data.name == name


def test_an_experiment_trains_on_a_prepared_set_and_keeps_its_conditions(tmp_path):
    """train_tokenizer, encode_dataset and train_prior with data=bair: of a tiny set that says that it is BAIR."""
    prepare(Noise(name="bair", frame_size=16), tmp_path / "bair")
    options = [
        "data=bair",
        f"data.root={tmp_path}/bair",
        "channels=3",
        "clip_length=4",
        "cache.splits=[train,val,test]",
    ]
    call_tool("train_tokenizer", tmp_path, *options)
    call_tool("encode_dataset", tmp_path, *options)
    cached = LatentCacheDataset(tmp_path / "run/latents/train", 4)
    assert cached[0]["conditions"]["actions"].shape == (4, 4)
    figures = call_tool("train_prior", tmp_path, *options)
    assert figures["prior"]
    with pytest.raises(ValueError, match=r"holds frames of 16 pixels, asked for 24: set frame_size=16"):
        call_tool("train_tokenizer", tmp_path, *options, "frame_size=24", f"run_dir={tmp_path}/other")
