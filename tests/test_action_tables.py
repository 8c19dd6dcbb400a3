"""Folders in which a table of actions lies beside each video, and sets that are told to give actions to priors."""

import json
import re
import shutil
import sys

import numpy as np
import pytest
import torch
from noise_benchmark import Noise
from video_files import counter_frames, encode, read_counter

from latentcast import prepared_videos
from latentcast.data.sets.action_tables import read_actions
from latentcast.data.sets.folder import Folder
from latentcast.data.store.prepared import IncompleteError, prepare
from latentcast.data.video.reader import VideoError

FIRST = {"a": 0, "b": 50, "c": 100}  # videos of 12 frames, which show the numbers from here on
N_FRAMES = 12
OPTIONS = {"val_fraction": 0.0, "test_fraction": 0.0, "frame_size": 64, "channels": 1}


@pytest.fixture(scope="module")
def videos(tmp_path_factory):
    root = tmp_path_factory.mktemp("videos")
    for name, first in FIRST.items():
        encode(root / f"{name}.mp4", counter_frames(N_FRAMES, 64, 64, first))
    return root


def rows(name):
    """(12, 2): row t of a video that begins with the number n is n + t and half of that."""
    numbers = np.arange(N_FRAMES, dtype=np.float64) + FIRST[name]
    return np.stack([numbers, numbers / 2], 1)


def write(path, table, header=None):
    """A table of the kind that its name says; a parquet file has one column of lists, or of numbers."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".npy":
        np.save(path, table)
    elif path.suffix == ".parquet":
        pyarrow = pytest.importorskip("pyarrow", reason="the extra latentcast[parquet] is not installed")
        from pyarrow import parquet

        columns = {"action": table.tolist(), "frame_index": list(range(len(table)))}
        parquet.write_table(pyarrow.table(columns), path)
    else:
        lines = [",".join(map(str, np.atleast_1d(row).tolist())) for row in table]
        path.write_text("\n".join([*([header] if header else []), *lines]) + "\n")


def source_with(videos, folder, tables, suffix=".csv", **options):
    """A folder of the videos and their tables, as a benchmark"""
    shutil.copytree(videos, folder, dirs_exist_ok=True)
    for name, table in tables.items():
        write(folder / f"{name}{suffix}", table)
    return Folder(folder, actions="{folder}/{stem}" + suffix, **OPTIONS | options)


def prepared(benchmark, root):
    """name of a video -> (numbers that its frames show, its actions)"""
    prepare(benchmark, root)
    data, found = prepared_videos(root, "train", 2, actions=True), {}
    for index, video in enumerate(data.videos):
        frames = data.read_video(index, 0, video.n_frames)
        found[video.name] = read_counter(frames), data.read_conditions(index, 0, video.n_frames)["action"]
    return found


@pytest.mark.parametrize("suffix", [".csv", ".npy", ".parquet"])
@pytest.mark.parametrize("kind", ["after", "between", "before"])
def test_what_led_to_each_frame(videos, tmp_path, suffix, kind):
    tables = {name: rows(name)[: N_FRAMES - (kind == "between")] for name in FIRST}
    benchmark = source_with(videos, tmp_path / "source", tables, suffix, action_rows=kind)
    assert benchmark.conditions == {"action": {"shape": [2], "dtype": "float32", "per": "frame"}}
    for name, first in FIRST.items():
        shown, actions = prepared(benchmark, tmp_path / "set")[f"{name}.mp4"]
        assert shown == list(range(first, first + N_FRAMES)) and actions[0].tolist() == [0, 0]
        led = torch.tensor(shown[1:]) - int(kind != "before")  # after frame n was done n, which led to n + 1
        assert torch.equal(actions[1:], torch.stack([led, led / 2], 1).float())


def test_a_stride_keeps_every_action_that_led_to_a_frame(videos, tmp_path):
    tables = {name: rows(name) for name in FIRST}
    benchmark = source_with(videos, tmp_path / "source", tables, frame_stride=4)
    assert benchmark.conditions["action"]["shape"] == [4, 2] and benchmark.fps == 25 / 4
    shown, actions = prepared(benchmark, tmp_path / "set")["b.mp4"]
    assert shown == [50, 54, 58] and actions[..., 0].tolist() == [[0] * 4, [50, 51, 52, 53], [54, 55, 56, 57]]


def test_whole_numbers_are_counted_over_all_tables(videos, tmp_path):
    tables = {name: np.arange(N_FRAMES) % 3 + i for i, name in enumerate(FIRST)}
    spec = {"shape": [], "dtype": "int64", "per": "frame", "n_values": 5}
    benchmark = source_with(videos, tmp_path / "source", tables)
    assert benchmark.conditions == {"action": spec}
    assert prepared(benchmark, tmp_path / "set")["c.mp4"][1].tolist() == [0, *(t % 3 + 2 for t in range(11))]

    def told(**options):
        return source_with(videos, tmp_path / "source", {}, **options).conditions["action"]

    assert told(action_values=9) == spec | {"n_values": 9}
    assert told(action_dtype="float32") == {"shape": [], "dtype": "float32", "per": "frame"}
    write(tmp_path / "source/b.csv", np.arange(N_FRAMES) - 1)
    assert told()["dtype"] == "float32"  # -1 is no number of an action
    write(tmp_path / "source/b.csv", np.arange(N_FRAMES) / 1.0)
    assert told()["dtype"] == "float32" and told(action_dtype="int64") == spec | {"n_values": 12}
    write(tmp_path / "source/b.csv", np.arange(N_FRAMES))
    message = r"b\.csv: expected whole numbers from 0 to 8, found 9"
    with pytest.raises(IncompleteError, match=message):
        prepare(source_with(videos, tmp_path / "source", {}, action_values=9), tmp_path / "nine")


def test_a_folder_as_lerobot_has_it(videos, tmp_path, command):
    root = tmp_path / "source"
    for i, name in enumerate(FIRST):
        chunk = f"chunk-{i // 2:03d}"
        for camera in ("top", "wrist"):
            path = root / f"videos/{chunk}/{camera}/episode_{i:06d}.mp4"
            path.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(videos / f"{name}.mp4", path)
        write(root / f"data/{chunk}/episode_{i:06d}.parquet", rows(name))
    arguments = "folder", "--source", root, "--output", tmp_path / "set", "--workers", 0
    options = "--actions", "data/{1}/{stem}.parquet", "val_fraction=0", "test_fraction=0", "action_columns=action"
    status, figures, err = command("prepare_dataset", *arguments, *options)
    assert status == 0 and figures["counts"]["train"] == 6, err
    data = prepared_videos(tmp_path / "set", "train", 2)
    assert data.read_conditions(5, 0, 3)["action"].tolist() == [[0, 0], [100, 50], [101, 50.5]]


def test_columns_are_chosen_by_name(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text('\ufefftime, "left" ,right,note\n0.0,1,2.5,x\n0.1,3,4,y\n\n\n')
    assert read_actions(path, ["right", "left"]).tolist() == [[2.5, 1], [4, 3]]
    assert read_actions(path, ["left"]).tolist() == [1, 3] and read_actions(path, ["left"]).dtype == torch.int64
    for columns, message in (
        (["up"], r"a\.csv: expected the columns up, found \['time', 'left', 'right', 'note'\]"),
        (None, r"a\.csv: row 2: expected numbers, found 'x'"),
    ):
        with pytest.raises(VideoError, match=message):
            read_actions(path, columns)


@pytest.mark.parametrize(
    "content, message",
    [
        (None, "no such file; expected a table of actions"),
        ("drop 5", r"expected 12 rows for 12 frames \(action_rows=after\), found 11"),
        ("blank 5", "row 6: expected 2 numbers, found none"),
        ("1,2\n3\n", "row 2: expected 2 numbers, found 1"),
        ("x,y\n1,2\n3,oops\n", "row 3: expected numbers, found 'oops'"),
        ("1,nan\n3,4\n", "row 1: expected numbers, found 'nan'"),
        ("1,2,3\n" * 12, r"expected rows of shape \[2\] as in .*a\.csv, found \[3\]"),
        ("", "expected rows of numbers, found none"),
        (b"\xff\xfe\x00", "not a readable csv file"),
    ],
)
def test_a_damaged_table_costs_its_video_alone_and_a_rerun_goes_on(videos, tmp_path, content, message):
    tables = {name: rows(name) for name in FIRST}
    benchmark = source_with(videos, tmp_path / "source", tables)
    path = tmp_path / "source/b.csv"
    whole = path.read_text()
    lines = whole.splitlines()
    if content is None:
        path.unlink()
    elif isinstance(content, bytes):
        path.write_bytes(content)
    elif content == "drop 5":
        path.write_text("\n".join(lines[:5] + lines[6:]))
    elif content == "blank 5":
        path.write_text("\n".join([*lines[:5], "", *lines[6:]]))
    else:
        path.write_text(content)
    with pytest.raises(IncompleteError, match=rf"train 3; found: train 2; .*source/b\.csv: {message}"):
        prepare(Folder(tmp_path / "source", actions="{stem}.csv", **OPTIONS), tmp_path / "set")
    note = json.loads((tmp_path / "set/train/shard-00000.json").read_text())
    assert sorted(note["videos"]) == ["0", "2"] and list(note["skipped"]) == ["1"]
    path.write_text(whole)
    again = Folder(tmp_path / "source", actions="{stem}.csv", **OPTIONS)
    assert prepared(again, tmp_path / "set")["b.mp4"][1][1].tolist() == [50, 25]
    assert again.conditions == benchmark.conditions


@pytest.mark.parametrize(
    "suffix, content, message",
    [
        (".npy", b"no numpy", "not a readable npy file of numbers"),
        (".npy", np.array(["up"] * 12), "expected rows of numbers, found <U2"),
        (".npy", np.array([[0.0, np.inf]] * 12), r"row 0 \(from 0\): expected finite numbers"),
        (".parquet", b"no parquet", "not a readable parquet file"),
        (".parquet", np.array(["up"] * 12), "column action: expected numbers"),
    ],
)
def test_damaged_tables_of_other_kinds(tmp_path, suffix, content, message):
    path = tmp_path / f"a{suffix}"
    if isinstance(content, bytes):
        pytest.importorskip("pyarrow") if suffix == ".parquet" else None
        path.write_bytes(content)
    else:
        write(path, content)
    with pytest.raises(VideoError, match=rf"a\{suffix}: {message}") as error:
        read_actions(path)
    assert "\n" not in str(error.value)


def test_a_parquet_file_without_the_column(tmp_path):
    path = tmp_path / "a.parquet"
    write(path, rows("a"))
    with pytest.raises(VideoError, match=r"expected the columns actions, found \['action', 'frame_index'\]"):
        read_actions(path, ["actions"])
    assert read_actions(path, ["frame_index", "action"]).shape == (12, 3)


def test_a_missing_table_that_may_hold_the_largest_number_is_named_first(videos, tmp_path):
    with pytest.raises(ValueError, match=r"c\.csv: no such file.*; it may hold the largest action: mend it, or give"):
        prepare(source_with(videos, tmp_path / "source", {n: np.arange(12) for n in "ab"}), tmp_path / "set")
    assert not (tmp_path / "set/train").exists()
    told = Folder(tmp_path / "source", actions="{stem}.csv", action_values=20, **OPTIONS)
    assert prepare(told, tmp_path / "set", partial=True)["counts"] == {"train": 2}


@pytest.mark.parametrize(
    "options, message",
    [
        ({"actions": "{stem}.txt"}, "--actions: expected the path of .csv, .npy, .parquet files, found '{stem}.txt'"),
        ({"actions": "{name}.csv"}, "expected {folder}, {stem}, {0}, {1}, ..., found {name}"),
        (
            {"actions": "{stem}.csv", "action_rows": "next"},
            "action_rows: expected after, between, before, found 'next'",
        ),
        ({"actions": "{stem}.csv", "fps": 5}, "fps: expected one frame rate, that of all videos, with --actions"),
        ({"actions": "{stem}.csv", "action_dtype": "int8"}, "action_dtype: expected float32, int64 or null"),
        ({"actions": "{stem}.csv", "action_values": 0}, "action_values: expected a whole number of at least 1"),
        ({"actions": "{stem}.csv", "action_values": 3, "action_dtype": "float32"}, "action_values: expected whole"),
        ({"actions": "{stem}.npy", "action_columns": ["x"]}, "action_columns: expected names, of csv or parquet files"),
        ({"action_columns": ["x"]}, "action_columns: expected --actions beside it"),
        ({"actions": "{3}/{stem}.csv"}, "a.mp4: expected a path with a part '3' for {3}/{stem}.csv"),
    ],
)
def test_options_that_make_no_sense(videos, options, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        Folder(videos, **OPTIONS | options).conditions  # noqa: B018


def test_videos_of_different_rates_have_no_actions_in_common(videos, tmp_path):
    tables = {name: rows(name) for name in FIRST}
    benchmark = source_with(videos, tmp_path / "source", tables)
    encode(tmp_path / "source/c.mp4", counter_frames(N_FRAMES, 64, 64), fps=10)
    with pytest.raises(ValueError, match=r"source: expected one frame rate, .* with --actions.*found 10 to 25 frames"):
        prepare(benchmark, tmp_path / "set")


def test_without_pyarrow_the_extra_is_named(videos, monkeypatch):
    monkeypatch.setattr(sys, "path", [])
    monkeypatch.delitem(sys.modules, "pyarrow", raising=False)
    with pytest.raises(
        ValueError, match=r"parquet needs pyarrow, which is not installed; pip install 'latentcast\[par"
    ):
        Folder(videos, actions="{stem}.parquet", **OPTIONS)


# ------------------------------------------------------------------------------------------------------ the option


def test_sets_tell_priors_of_actions_only_when_asked_and_have_them(videos, tmp_path, caplog):
    tables = {name: rows(name) for name in FIRST}
    prepare(source_with(videos, tmp_path / "source", tables), tmp_path / "set")
    plain, told = (
        prepared_videos(tmp_path / "set", "train", 2),
        prepared_videos(tmp_path / "set", "train", 2, actions=True),
    )
    assert (plain.actions, told.actions) == (False, True) and plain.describe() == told.describe()
    mirrored = prepared_videos(tmp_path / "set", "train", 2, flip="both", actions=True)
    assert "flip: both is left out with actions" in caplog.text
    assert all(torch.equal(mirrored[i]["frames"], plain[i]["frames"]) for i in range(len(plain)))
    with pytest.raises(ValueError, match=r"frame_stride: expected 1 with actions, .* found 2"):
        prepared_videos(tmp_path / "set", "train", 2, frame_stride=2, actions=True)
    with pytest.raises(ValueError, match="actions: expected true or false, found 'yes'"):
        prepared_videos(tmp_path / "set", "train", 2, actions="yes")
    prepare(Noise(), tmp_path / "noise")  # as BAIR was called once
    with pytest.raises(
        ValueError, match=r"noise: noise has no condition 'action', found actions, label; .*prepare it again"
    ):
        prepared_videos(tmp_path / "noise", "train", 2, actions=True)
