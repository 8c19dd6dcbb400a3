"""Which files below a folder are videos, and names of every kind: the same for training and all tools."""

import json
import logging
import os
import shutil

import pytest
from PIL import Image
from video_files import counter_frames, encode, read_counter

from latentcast import VideoFolder
from latentcast.data.sets.folder import Folder
from latentcast.data.video.folder import SUFFIXES, list_videos

ALL_TRAIN = {"val_fraction": 0.0, "test_fraction": 0.0}
LATIN1 = os.fsdecode("caf\xe9.mp4".encode("latin-1"))
ODD_NAMES = [LATIN1, "two\nlines.mp4", "take #2.mp4", "http:x.mp4", "take: 2.mp4", "-dash.mp4", "é 日本.mp4"]
ODD_NAMES += ["x" * 251 + ".mp4"]


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    return encode(tmp_path_factory.mktemp("clip") / "clip.mp4", counter_frames(8, 32, 32))


def lay(clip, root, *names):
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(clip, root / name)
    return root


def test_hidden_system_and_odd_entries_are_left_out(clip, tmp_path, caplog):
    caplog.set_level(logging.INFO, "latentcast")
    hidden = [".cache/a.mp4", ".Trash-1000/files/b.mp4", "@eaDir/c.mp4/SYNOPHOTO.mp4", "__MACOSX/d.mp4", "._e.mp4"]
    hidden += ["lost+found/f.mp4", "$RECYCLE.BIN/g.mp4", "deep/@EADIR/h.mp4"]
    lay(clip, tmp_path, "a.mp4", "clip.mp4/inner.mp4", "deep/er/B.MP4", *hidden)
    for name in ("notes.txt", "deep/more.TXT", "Makefile", "song.mp3"):
        (tmp_path / name).touch()
    os.mkfifo(tmp_path / "pipe.mp4")
    (tmp_path / "gone.mkv").symlink_to("nowhere.mkv")
    (tmp_path / "self.avi").symlink_to("self.avi")
    names = ["a.mp4", "clip.mp4/inner.mp4", "deep/er/B.MP4"]
    assert list_videos(tmp_path) == names
    assert f"{tmp_path}: left out by suffix: 2 .txt, 1 without suffix, 1 .mp3" in caplog.text
    assert "left out 3 that lead to no file: gone.mkv, pipe.mp4, self.avi" in caplog.text
    assert [v.name for v in VideoFolder(tmp_path, "train", 8, 16, **ALL_TRAIN).videos] == names
    assert Folder(tmp_path, **ALL_TRAIN).videos()["train"] == names


def test_links_to_folders_are_followed_once_and_loops_end(clip, tmp_path):
    lay(clip, tmp_path, "elsewhere/one/a.mp4", "elsewhere/two/b.mp4")
    root = tmp_path / "links"
    root.mkdir()
    for name in ("one", "two"):
        (root / name).symlink_to(tmp_path / "elsewhere" / name)
    (root / "file.mp4").symlink_to(clip)
    (root / "three").symlink_to(root / "two")  # the same folder again
    (tmp_path / "elsewhere/one/back").symlink_to(root)
    names = ["file.mp4", "one/a.mp4", "three/b.mp4"]
    assert list_videos(root) == names
    assert [v.name for v in VideoFolder(root, "train", 8, 16, **ALL_TRAIN).videos] == names
    assert Folder(root, **ALL_TRAIN).videos()["train"] == names


def test_every_suffix_is_listed_in_any_case(tmp_path):
    expected = "3gp avi flv gif m2ts m4v mkv mov mp4 mpeg mpg mts ogg ogv ts vob webm wmv".split()
    assert sorted(SUFFIXES) == sorted(f".{suffix}" for suffix in expected)
    for suffix in expected:
        (tmp_path / f"a.{suffix.upper()}").touch()
    assert list_videos(tmp_path) == sorted(f"a.{suffix.upper()}" for suffix in expected)


def test_a_folder_that_cannot_be_read_is_named(clip, tmp_path, caplog, monkeypatch):
    lay(clip, tmp_path, "a.mp4", "x" * 200 + "/b.mp4")
    monkeypatch.chdir(tmp_path / ("x" * 200))
    for _ in range(20):  # 4,096 bytes are the longest path that the system opens
        os.mkdir("y" * 200)
        os.chdir("y" * 200)
    assert list_videos(tmp_path) == ["a.mp4", "x" * 200 + "/b.mp4"]
    assert "left out, it cannot be read (File name too long)" in caplog.text


def test_pictures_beside_videos_are_no_video_and_one_picture_is_none(clip, tmp_path):
    lay(clip, tmp_path, *(f"clips/clip{i}.mp4" for i in range(8)))
    pictures = [f"clips/clip{i}.jpg" for i in range(8)] + ["album/cover1.jpg", "frames/0.png", "frames/1.png"]
    for name in pictures:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        Image.new("RGB", (32, 32)).save(tmp_path / name)
    videos = Folder(tmp_path, fps=25, **ALL_TRAIN).videos()["train"]
    assert videos == [*(f"clips/clip{i}.mp4" for i in range(8)), "frames"]
    assert Folder(tmp_path / "frames", **ALL_TRAIN).videos()["train"] == ["."]


@pytest.mark.parametrize("folder", [os.fsdecode(b"caf\xe9 #2: a\nb"), "x" * 255], ids=["latin-1", "long"])
def test_odd_names_pass_through_listing_index_and_splits(clip, tmp_path, folder):
    root = lay(clip, tmp_path / folder, *ODD_NAMES)
    assert list_videos(root) == sorted(ODD_NAMES)
    splits = Folder(root, val_fraction=0.3, test_fraction=0.3).videos()
    assert sorted(name for names in splits.values() for name in names) == sorted(ODD_NAMES)
    for _ in range(2):
        dataset = VideoFolder(root, "train", 8, 32, index_dir=tmp_path / "index", val_fraction=0.3, test_fraction=0.3)
        assert [video.name for video in dataset.videos] == splits["train"]
    assert read_counter(dataset.read_video(0, 0, 8)) == list(range(8))
    (index,) = (tmp_path / "index").glob("*.json")
    assert json.loads(index.read_text())["files"].keys() == set(ODD_NAMES)
