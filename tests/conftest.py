"""Fixtures that several test files share."""

import gc
import importlib
import json
import multiprocessing
import os
import sys
from collections import Counter
from multiprocessing import forkserver

# Before torch is loaded, and for the processes that tests start too, whatever the environment says: on tiny tensors,
# threads that wait for each other are ten times slower than one, and pytest-xdist keeps all cores busy already.
os.environ["OMP_NUM_THREADS"] = "1"

os.environ["WANDB_MODE"] = "disabled"  # each run takes seconds; test_wandb.py has its own

import checked_calls  # before anything of latentcast is imported
import pytest
from tiny_experiment import BENCHMARKS, TOOLS, Started, typed
from video_files import counter_frames, cut_off, encode


@pytest.fixture(scope="session", autouse=True)
def rare_collections():
    """Python looks for cycles among a million objects of libraries over and over: a tenth of the tests' time."""
    gc.freeze()
    gc.set_threshold(20_000, 50, 100)


@pytest.fixture(scope="session", autouse=True)
def fork_server():
    """In a run of many files: what loaders, ranks and tools need as processes is imported once, not by each.

    Not by ``loading.worker_context``, whose processes do not hear the SIGTERM by which pools end theirs."""
    if "PYTEST_XDIST_WORKER" in os.environ:
        modules = ["latentcast.training.run", "latentcast.zoo", "torch._dynamo", "sklearn.cluster", "pytest"]
        modules += ["latentcast.evaluation.evaluator", "matplotlib.backends.backend_agg", "sklearn.datasets"]
        multiprocessing.get_context("forkserver").set_forkserver_preload(modules)
        forkserver.ensure_running()


@pytest.fixture
def benchmark_module(monkeypatch):
    """name -> a module of ``benchmarks/``; last on the path, for one is called as HuggingFace's ``tokenizers``."""
    monkeypatch.setattr(sys, "path", [*sys.path, str(BENCHMARKS)])
    return importlib.import_module


@pytest.fixture(autouse=True)
def nothing_goes_on():
    """What a test started does not outlive it, also where it fails."""
    yield
    Started.end_all()


@pytest.fixture(autouse=True)
def calls_are_checked_anew():
    checked_calls.begin()


LONGEST = [  # files, from the longest; of the others those of most tests take longest
    *("test_swap_matrix", "test_training", "test_resume", "test_long_rollouts", "test_shares", "test_packaging"),
    *("test_evaluate", "test_docs", "test_conditions", "test_loading", "test_flow_dataset", "test_ranks"),
    *("test_residual_diffusion", "test_compiling", "test_league", "test_playground", "test_joint_training"),
    *("test_train_tools", "test_contributing", "test_gpu_day", "test_encode_dataset", "test_lattice_boltzmann"),
    *("test_prepared", "test_notebooks", "test_chunked_tokenizers", "test_fvd", "test_console", "test_wandb"),
]


def pytest_configure(config):
    config.option.loadscopereorder = False  # pytest-xdist's own order begins with the files of most tests


def pytest_collection_modifyitems(items):
    """Long files first, else one worker is left alone with one of them in the end."""
    sizes = Counter(item.path for item in items)
    places = {name: place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: (places.get(item.path.stem, len(places)), -sizes[item.path]))


@pytest.fixture(scope="session")
def video_folder(tmp_path_factory):
    """A tree of videos: six good ones of 24 to 34 frames, a short one (5), one cut off, and a text file called .mp4."""
    root = tmp_path_factory.mktemp("videos")
    (root / "deep" / "er").mkdir(parents=True)
    encode(root / "a.mp4", counter_frames(24, first=0), options={"crf": "12", "g": "6"})
    encode(root / "b.mkv", counter_frames(26, first=30, height=49, width=67), pix_fmt="yuv444p")
    encode(root / "deep" / "c.avi", counter_frames(28, first=60), codec="mpeg4", options={"b": "2000000"})
    encode(root / "deep" / "d.webm", counter_frames(30, first=90), codec="libvpx", options={"b": "2000000"})
    encode(root / "deep" / "er" / "e.gif", counter_frames(32, first=120), codec="gif", pix_fmt="rgb8")
    encode(root / "deep" / "er" / "f.MOV", counter_frames(34, first=160))
    encode(root / "short.mp4", counter_frames(5, first=200))
    cut_off(encode(root / "deep" / "g.mp4", counter_frames(40)), root / "cut.mp4")
    (root / "deep" / "g.mp4").unlink()
    (root / "text.mp4").write_text("these are not frames\n" * 40)
    (root / "notes.txt").write_text("not looked at")
    return root


@pytest.fixture
def unchecked(monkeypatch):
    """Calls are not checked: torch.compile cannot trace what checks them."""
    checked_calls.stop(monkeypatch)


@pytest.fixture
def command():
    """Run ``command(tool, *arguments)`` as ``typed`` does -> (exit status, figures or None, stderr)."""

    def run(tool, *arguments):
        status, out, err = typed(TOOLS / f"{tool}.py", arguments)
        return status, json.loads(out.splitlines()[-1]) if out.strip() else None, err

    return run


def pytest_runtest_setup(item):
    """Tests marked ``gpu`` are skipped where there is none: the one place that says so."""
    for marker in item.iter_markers("gpu"):
        import torch  # here: not every test needs it

        needed, found = marker.args[0] if marker.args else 1, torch.cuda.device_count()
        if found < needed:
            pytest.skip(f"needs {needed} CUDA device(s), found {found}")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport():
    """What a test logged travels from pytest-xdist's workers as UTF-8, where a file name of other bytes ends them."""
    report = yield
    report.sections = [(title, text.encode("utf-8", "backslashreplace").decode()) for title, text in report.sections]
    return report
