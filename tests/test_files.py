"""Files that appear whole or not at all, and folders that one run at a time works in."""

import json
import os
import resource
import shutil
import signal
import socket
import subprocess
import sys
import time

import matplotlib.pyplot as plt
import pytest
import torch
from safetensors.torch import save_file

from latentcast.data.video.writer import write_image, write_video
from latentcast.files import SILENCE, InUseError, locked, read_json, replacing, temporary_path, write_json


def test_json_on_a_full_disk_leaves_what_stood_there(tmp_path):
    path = tmp_path / "figures.json"
    write_json(path, {"psnr": 20.5})
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (8000, limits[1]))  # a write beyond fails, as on a full disk
    try:
        with pytest.raises(OSError, match=r"figures.json: cannot be written \(File too large\)$"):
            write_json(path, {"psnr": list(range(5000))})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert read_json(path) == {"psnr": 20.5}
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    ("text", "message"), [("{", "not valid JSON"), ("[1]", "expected a JSON object, found list"), ("", "not valid")]
)
def test_anything_but_a_json_object_is_refused(tmp_path, text, message):
    path = tmp_path / "plan.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=rf"plan.json: {message}") as error:
        read_json(path)
    assert "\n" not in str(error.value)


HOLD = """
import os, sys, time
from latentcast.files import locked
with locked(sys.argv[1], "encoding"):
    child = bool(sys.argv[2:]) and os.fork() == 0
    if child or not sys.argv[2:]:
        print("in", os.getpid(), flush=True)
    time.sleep(60) if child else sys.stdin.read()
"""


def hold(folder, *with_child, **environment):
    """A process in ``locked`` until its stdin closes -> (process, what it printed)"""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(folder), *with_child],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | environment,
    )
    return process, process.stdout.readline()


def test_a_second_run_is_refused_by_name_until_the_first_has_ended(tmp_path):
    folder = tmp_path / "new"
    first, _ = hold(folder)
    line = rf"new: another run works here: encoding, process {first.pid} on {socket.gethostname()} since 2\d+-"
    with pytest.raises(InUseError, match=line) as error, locked(folder, "training"):
        pass
    assert "\n" not in str(error.value)
    first.communicate()
    with locked(folder, "training"):
        assert json.loads((folder / ".lock").read_text())["what"] == "training"
        with pytest.raises(InUseError, match=f"training, process {os.getpid()} on"), locked(folder, "encoding"):
            pass
        second, _ = hold(folder)
        assert second.wait() == 1 and f"training, process {os.getpid()} on" in second.stderr.read()
    assert list(folder.iterdir()) == []


def test_the_lock_of_a_killed_run_is_taken_over_though_its_children_live_on(tmp_path):
    first, line = hold(tmp_path, "with a child")
    first.kill()
    first.wait()
    try:
        assert (tmp_path / ".lock").is_file()
        with locked(tmp_path, "training"):
            pass
    finally:
        os.kill(int(line.split()[1]), signal.SIGKILL)


def test_of_runs_that_start_together_one_gets_in(tmp_path):
    start = f"import sys, time; from latentcast import files; time.sleep(max(0, {time.time() + 2} - time.time()));"
    command = [sys.executable, "-c", start + "exec(sys.argv.pop(1))"]
    runs = [
        subprocess.Popen([*command, HOLD, str(tmp_path)], stdin=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for _ in range(4)
    ]
    deadline = time.monotonic() + 60
    while sum(run.poll() is not None for run in runs) < 3 and time.monotonic() < deadline:
        time.sleep(0.05)
    ended = [run for run in runs if run.poll() is not None]
    assert [run.returncode for run in ended] == [1, 1, 1]
    for run in runs:
        _, err = run.communicate()
        assert ("InUseError" in err) == (run in ended)


def test_the_ranks_of_one_job_share_a_lock(tmp_path):
    first, _ = hold(tmp_path, RANK="0", LOCAL_RANK="0")
    second, line = hold(tmp_path, RANK="1", LOCAL_RANK="1")
    assert line == f"in {second.pid}\n"
    second.communicate()
    assert (tmp_path / ".lock").is_file()
    first.communicate()
    assert not (tmp_path / ".lock").exists()


def test_the_lock_of_another_machine_counts_while_it_is_touched(tmp_path):
    lock = tmp_path / ".lock"
    holder = {"pid": 7, "host": "node3", "kernel": "another", "machine": "01234567", "what": "training", "since": "now"}
    lock.write_text(json.dumps(holder))
    with pytest.raises(InUseError, match="training, process 7 on node3 since now"), locked(tmp_path, "encoding"):
        pass
    assert json.loads(lock.read_text()) == holder
    long_ago = time.time() - SILENCE - 1
    os.utime(lock, (long_ago, long_ago))
    with locked(tmp_path, "encoding"):
        assert json.loads(lock.read_text())["pid"] == os.getpid()


def test_a_folder_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match=r"file/.lock: cannot be written \((File exists|Not a directory)\)$"):
        with locked(tmp_path / "file", "encoding"):
            pass


def test_temporary_files_of_killed_processes_go_with_the_next_run(tmp_path):
    program = "import os, sys\nfrom latentcast.files import replacing\nwith replacing(sys.argv[1]) as part:\n"
    program += "    part.touch(); os.kill(os.getpid(), 9)"
    subprocess.run([sys.executable, "-c", program, str(tmp_path / "one.json")])
    assert len(list(tmp_path.iterdir())) == 1
    live = temporary_path(tmp_path / "two.json")
    elsewhere = [tmp_path / f".0123abcd-7-0000000{i}.tmp" for i in range(2)]
    for path in (live, *elsewhere, tmp_path / "own.tmp"):
        path.touch()
    os.utime(elsewhere[0], (0, 0))
    write_json(tmp_path / "three.json", {})
    assert set(tmp_path.iterdir()) == {live, elsewhere[1], tmp_path / "own.tmp", tmp_path / "three.json"}


def save_pictures(path):
    write_image(path, torch.rand(3, 200, 200) * 2 - 1)


def save_figure(path):
    with replacing(path) as temporary:
        plt.figure().savefig(temporary, format="png", dpi=200)


def save_tensors(path):
    with replacing(path) as temporary:
        save_file({"weight": torch.zeros(10_000)}, temporary)


def save_checkpoint(path):
    with replacing(path) as temporary:
        torch.save({"weight": torch.zeros(10_000)}, temporary)


def save_video(path):
    write_video(path, torch.rand(40, 3, 64, 64) * 2 - 1, fps=10)


def copy(path):
    with replacing(path) as temporary:
        shutil.copyfile(path.parent / "source", temporary)


@pytest.mark.parametrize(
    ("name", "write"),
    [
        ("a.png", save_pictures),
        ("a.png", save_figure),
        ("a.safetensors", save_tensors),
        ("a.ckpt", save_checkpoint),
        ("a.mp4", save_video),
        ("a.gif", save_video),
        ("a.bin", copy),
    ],
)
def test_every_writer_names_its_file_and_why_it_cannot_be_written(tmp_path, name, write):
    path = tmp_path / "out" / name
    path.parent.mkdir()
    path.write_text("finished before")
    (path.parent / "source").write_bytes(bytes(20_000))
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (3000, limits[1]))
    try:
        with pytest.raises(OSError, match=rf"^{path}: cannot be written \(.*[Ff]ile too large\)$") as error:
            write(path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert "\n" not in str(error.value)
    assert path.read_text() == "finished before" and {p.name for p in path.parent.iterdir()} == {name, "source"}


def test_a_source_that_cannot_be_read_is_named_by_its_own_error(tmp_path):
    with pytest.raises(FileNotFoundError, match="source"), replacing(tmp_path / "copy") as temporary:
        shutil.copyfile(tmp_path / "source", temporary)
