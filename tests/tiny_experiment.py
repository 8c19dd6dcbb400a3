"""A tiny experiment on real classes, and ways to run the training tools on it."""

import argparse
import atexit
import contextlib
import io
import json
import logging
import multiprocessing
import os
import runpy
import signal
import socket
import sys
import tempfile
import threading
from pathlib import Path
from typing import ClassVar

import torch
import yaml
from lightning_utilities.core.rank_zero import rank_zero_only

from latentcast import load_config

ROOT = Path(__file__).parents[1]
TOOLS, BENCHMARKS = ROOT / "tools", ROOT / "benchmarks"
N_CLIPS = 24

EXPERIMENT = {
    "defaults": {"tokenizer": "vqvae", "data": "moving_digits", "trainer": "default"},
    "frame_size": 16,
    "channels": 1,
    "clip_length": 4,
    "n_context": 1,
    "batch_size": 8,
    "num_workers": 0,
    "data": {"n_videos": N_CLIPS, "n_heldout_videos": 8, "video_length": 6, "digit_size": 12},
    "tokenizer": {
        "hidden_channels": 16,
        "residual_channels": 8,
        "n_residual_blocks": 1,
        "embedding_dim": 8,
        "codebook_size": 16,
        "stride": 8,
    },
    "prior": {
        "_target_": "latentcast.VideoTransformer",
        "n_frames": 4,
        "subscale": [4, 1, 1],
        "dim": 16,
        "embed_dim": 8,
        "n_heads": 2,
        "head_dim": 8,
        "n_layers": 1,
    },
    "trainer": {
        "max_steps": 4,
        "log_every_n_steps": 1,
        "accelerator": "cpu",
        "limit_val_batches": 1,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    },
    "preview": {"n_clips": 2, "every_n_steps": 0, "figures": ["reconstructions", "futures"]},  # others take their time
    "wandb": {"mode": "disabled"},
}


def write_experiment(folder):
    """Write ``folder/tiny.yaml``, whose runs go to ``folder/run``."""
    path = Path(folder) / "tiny.yaml"
    path.write_text(yaml.safe_dump(EXPERIMENT | {"run_dir": str(Path(folder) / "run")}))
    return path


def tiny_config(folder, *overrides):
    return load_config(write_experiment(folder), overrides)


def assert_same_checkpoints(found, expected):
    """Weights, their average and the optimiser, bit for bit."""
    for part in ("state_dict", "current_model_state", "averaging_state"):
        assert expected[part].keys() == found[part].keys()
        for name, tensor in expected[part].items():
            assert torch.equal(tensor, found[part][name]), (part, name)
    assert str(expected["optimizer_states"]) == str(found["optimizer_states"])


def call_tool(tool, folder, *overrides):
    """Run a tool's ``main`` in this process -> its figures; errors are raised."""
    return call_main(tool, write_experiment(folder), *overrides)


def call_main(tool, experiment, *overrides):
    """``call_tool`` with the file of another experiment."""
    given = {"experiment": str(experiment), "overrides": list(overrides), "verify": False}
    if tool == "evaluate":
        given = dict.fromkeys(("pipeline", "data", "weights"))
        given |= {"arguments": [str(experiment), *overrides], "device": "cpu", "dtype": "float32"}
    return runpy.run_path(str(TOOLS / f"{tool}.py"))["main"](argparse.Namespace(**given))


def typed(script, arguments):
    """Run a script as from a shell, but in this process -> (exit status, stdout, stderr); a process of its own imports
    torch and its friends for seconds. Errors of a script that shows them are raised."""
    out, err = io.StringIO(), io.StringIO()
    argv, path, handlers, level = sys.argv, sys.path, logging.root.handlers, logging.root.level
    sys.argv, sys.path = [str(script), *map(str, arguments)], [*path, str(Path(script).parent)]
    logging.root.handlers = []
    status = 0
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            runpy.run_path(str(script), run_name="__main__")
    except SystemExit as ended:
        status = ended.code
    finally:
        sys.argv, sys.path, logging.root.handlers = argv, path, handlers
        logging.root.setLevel(level)
    return status, out.getvalue(), err.getvalue()


def start_tool(tool, folder, *overrides):
    """Start a tool as a process of its own -> Started."""
    return Started(TOOLS / f"{tool}.py", write_experiment(folder), *overrides, cwd=folder)


def run_tool(tool, folder, *overrides):
    """Run a tool as a process of its own -> (exit status, figures or None, stderr)."""
    return finished(start_tool(tool, folder, *overrides))


def finished(process):
    """-> (exit status, figures or None, stderr)."""
    out, err = process.communicate(timeout=150)
    return process.returncode, json.loads(out.splitlines()[-1]) if out.strip() else None, err


def free_port():
    """A port of this machine for processes to meet at."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def run_ranks(tool, folder, *arguments, n=2):
    """Run a tool in ``folder`` by ``n`` processes, to each of which torchrun's variables say what it is
    -> [(exit status, figures or None, stderr)]."""
    port = free_port()
    ranks = [Started(TOOLS / f"{tool}.py", *arguments, cwd=folder, **torchrun(rank, n, port)) for rank in range(n)]
    return [finished(rank) for rank in ranks]


def torchrun(rank, n, port):
    """The variables by which torchrun says what a process is."""
    job = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "TORCHELASTIC_RUN_ID": "tests", "GROUP_RANK": 0}
    job |= {"WORLD_SIZE": n, "LOCAL_WORLD_SIZE": n, "RANK": rank, "LOCAL_RANK": rank}
    return {name: str(value) for name, value in job.items()}


class Started:
    """A script that runs as a process of its own, in a process group of its own as a terminal gives it; by the methods
    of Popen.

    It is a fork of the server that has imported torch and Lightning, which take a new interpreter many seconds; not for
    what depends on when that happens, such as what is said on the way."""

    running: ClassVar = []  # of the test; those that it leaves are ended after it

    def __init__(self, script, *arguments, cwd, **environment):
        self.outputs = [tempfile.NamedTemporaryFile("w+") for _ in range(2)]
        names = [file.name for file in self.outputs]
        environment = os.environ | {name: str(value) for name, value in environment.items()}
        what = [str(script), *map(str, arguments)], str(cwd), dict(environment), names
        self.process = multiprocessing.get_context("forkserver").Process(target=_become, args=what)
        self.process.start()
        self.pid = self.process.pid
        self.running.append(self)

    returncode = property(lambda self: self.process.exitcode)

    def poll(self):
        return self.returncode

    def kill(self):
        self.process.kill()

    def communicate(self, timeout=None):
        self.process.join(timeout)
        if self.returncode is None:
            self.kill()
            raise TimeoutError(f"not ended within {timeout} s:\n{self.read()}")
        return self.read()

    @classmethod
    def end_all(cls):
        while cls.running:
            process = cls.running.pop()
            if process.poll() is None:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)

    def read(self):
        """-> [stdout, stderr] so far."""
        return [Path(file.name).read_text() for file in self.outputs]


def _become(argv, cwd, environment, outputs):
    """Make this process, of the fork server, the one that a shell would have started, up to its end."""
    os.setsid()
    for number, path in enumerate(outputs, start=1):
        file = os.open(path, os.O_WRONLY | os.O_APPEND)
        os.dup2(file, number)
        os.close(file)
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(environment)
    tempfile.tempdir = None  # of the server's environment
    signal.pthread_sigmask(signal.SIG_UNBLOCK, (signal.SIGINT, signal.SIGTERM))  # see loading.worker_context
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs begin with it ignored
    multiprocessing.set_start_method(None, force=True)
    rank_zero_only.rank = int(environment.get("RANK", 0))  # Lightning looks when it is imported
    sys.argv = argv
    sys.path.insert(0, os.path.dirname(argv[0]))
    try:
        runpy.run_path(argv[0], run_name="__main__")
    finally:
        threading._shutdown()
        atexit._run_exitfuncs()
