"""Loaders: where their workers come from, and what happens when one never comes back."""

import gc
import importlib
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from torch.utils.data import TensorDataset

from latentcast.data.loading import WorkerError, open_loader

HANGS = """
import ctypes, os, sys, time
import torch
from torch.utils.data import Dataset

class Hangs(Dataset):
    "Item 5 is never read: {how}."
    def __len__(self):
        return 8
    def __getitem__(self, index):
        if index == 5:
            open("reading", "w").close()
            {how}
        return index
    def item_name(self, index):
        return f"clip_{{index}}.mp4"

class FillsAndHangs(Hangs):
    def new_batch(self, n_items):
        return {{"number": torch.empty(n_items, dtype=torch.int64)}}
    def fill(self, batch, indices):
        for row, index in enumerate(indices):
            batch["number"][row] = self[index]
        return batch

def never(library):  # a lock that this thread has already: waits in C for ever, whatever signals come
    mutex = ctypes.create_string_buffer(64)
    library.pthread_mutex_lock(mutex), library.pthread_mutex_lock(mutex)
"""
# In Python; in C, where signals are only noted; in C that keeps the interpreter to itself.
PYTHON, NATIVE, HOLDING = "time.sleep(1e6)", "never(ctypes.CDLL(None))", "never(ctypes.PyDLL(None))"


def module(folder, how, name="hanging_reader"):
    (folder / f"{name}.py").write_text(HANGS.format(how=how))


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="needs Linux's list of open files")
def test_loaders_that_are_gone_leave_nothing_open():
    for _ in range(2):
        assert len(list(open_loader(TensorDataset(torch.zeros(4)), num_workers=1))) == 4
    gc.collect()
    open_files = [os.readlink(path) for path in Path("/proc/self/fd").iterdir() if path.is_symlink()]
    assert not [path for path in open_files if path.startswith("/dev/shm/")]


@pytest.mark.parametrize(
    ("name", "kind", "how", "timeout"),
    [
        ("native", "Hangs", NATIVE, 1),
        ("holding", "FillsAndHangs", HOLDING, 1),
        ("exits", "FillsAndHangs", "os._exit(3)", 60),
    ],
)
def test_an_item_that_a_worker_does_not_come_back_from_is_named(tmp_path, monkeypatch, name, kind, how, timeout):
    module(tmp_path, how, name := f"{name}_reader")  # the server of workers keeps the modules it has
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    dataset = getattr(importlib.import_module(name), kind)()
    loader = open_loader(dataset, num_workers=1, read_timeout=timeout, batch_size=2)
    seen, began = [], time.monotonic()
    with pytest.raises(WorkerError) as error:
        for batch in loader:
            seen += (batch["number"] if kind == "FillsAndHangs" else batch).tolist()
    reason = "the process that read it was lost" if "exit" in how else "reading it did not end within 1 s"
    assert str(error.value).startswith(f"clip_5.mp4: {reason}") and seen == list(range(len(seen)))
    assert time.monotonic() - began < 60


TOOL = """
import argparse, threading, signal, sys
from hanging_reader import Hangs
from latentcast import cli
from latentcast.data.loading import open_loader

cli.GRACE = 1
def main(args):
    if args.catch:
        signal.signal(signal.SIGTERM, lambda *_: None)  # as a training, which finishes its step
    return {"n": len(list(open_loader(Hangs(), num_workers=args.workers)))}

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs begin with it ignored
    parser = argparse.ArgumentParser()
    parser.add_argument("--workers", type=int, default=0)
    parser.add_argument("--catch", action="store_true")
    cli.run_tool(main, parser)
"""


@pytest.mark.parametrize(
    "arguments, numbers, status, message",
    [
        ([], [signal.SIGINT, signal.SIGINT], 130, "interrupted: ended without finishing"),
        (["--catch"], [signal.SIGTERM], 143, "interrupted while reading clip_5.mp4: ended without finishing"),
        (["--workers=1"], [signal.SIGINT], 130, "interrupted"),
        (["--workers=1"], [signal.SIGKILL], -9, ""),  # of the main process alone
    ],
)
def test_a_tool_that_hangs_in_native_code_can_be_ended(tmp_path, arguments, numbers, status, message):
    module(tmp_path, NATIVE)
    (tmp_path / "tool.py").write_text(TOOL)
    path = os.pathsep.join([str(Path(__file__).parents[1]), str(tmp_path), os.environ.get("PYTHONPATH", "")])
    command = [sys.executable, str(tmp_path / "tool.py"), *arguments]
    options = {"stderr": subprocess.PIPE, "text": True, "cwd": tmp_path, "start_new_session": True}
    process = subprocess.Popen(command, env=os.environ | {"PYTHONPATH": path}, **options)
    try:
        while not (tmp_path / "reading").exists():
            assert process.poll() is None, process.communicate()[1]
            time.sleep(0.05)
        for number in numbers:
            time.sleep(0.3)
            (os.kill if number == signal.SIGKILL else os.killpg)(process.pid, number)
        _, err = process.communicate(timeout=60)  # until the workers are gone as well: they have the same stderr
    finally:
        with_group_gone(process)
    assert process.returncode == status and f"\n{err}".splitlines()[-1].startswith(message), err


def with_group_gone(process):
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        pass


THREADS = """
import torch
from torch.utils.data import Dataset
from latentcast.data.loading import open_loader

def parallel_region():
    torch.set_num_threads(2)
    return torch.randn(1 << 20).exp().sum()

class Uses(Dataset):
    def __len__(self):
        return 2
    def __getitem__(self, index):
        return parallel_region()  # hangs in a fork of a process that has run one

if __name__ == "__main__":
    assert torch.get_num_threads() == 2
    parallel_region()
    print(len(list(open_loader(Uses(), num_workers=1))))
"""


def test_workers_may_use_threads_after_the_main_process_has(tmp_path):
    (tmp_path / "threads.py").write_text(THREADS)
    environment = os.environ | {"OMP_NUM_THREADS": "2", "PYTHONPATH": str(Path(__file__).parents[1])}
    command = [sys.executable, str(tmp_path / "threads.py")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert done.stdout == "2\n", done.stderr


def leave_a_loader_open(kept=[]):  # noqa: B006 - it lives as long as its process
    batches = iter(open_loader(range(1000), num_workers=1))
    kept.append(batches)
    next(batches)


def test_a_process_that_multiprocessing_started_ends_with_a_loader_open():
    process = multiprocessing.get_context("spawn").Process(target=leave_a_loader_open)
    process.start()
    process.join(60)
    ended = process.exitcode
    process.kill()
    assert ended == 0
