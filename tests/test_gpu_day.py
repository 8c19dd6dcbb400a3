"""The benchmark for a GPU that is there for minutes: what a cut leaves, and that it keeps to its time."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from tiny_experiment import BENCHMARKS, write_experiment

from latentcast import load_config


@pytest.fixture
def gpu_day(benchmark_module):
    return benchmark_module("gpu_day")


def read(folder):
    return json.loads((folder / "report.json").read_text()), (folder / "report.md").read_text()


def test_a_row_has_figures_or_the_first_line_of_an_error(gpu_day, tmp_path):
    report = gpu_day.Report(tmp_path, "cpu", 1, True)
    with report.row("training step", "lvt", mode="fp32") as row:
        row["seconds"] = 0.123456
    with report.row("training step", "rvd", mode="fp32"):
        raise RuntimeError("out of memory\nmore lines")
    content, table = read(tmp_path)
    assert [row.get("seconds") for row in content["rows"]] == [0.123456, None]
    assert content["rows"][1]["error"] == "RuntimeError: out of memory" and not content["finished"]
    assert "| lvt | fp32 | 0.1235 |  |" in table and "what comes after this" in table


def test_it_keeps_to_its_time(gpu_day, tmp_path, monkeypatch):
    report = gpu_day.Report(tmp_path, "cpu", 1, True)
    monkeypatch.setattr(gpu_day, "LEAST_LEFT", 0.1)
    report.part_ends = time.monotonic() + 0.5
    with report.row("sampling", "long"):
        time.sleep(20)
    with pytest.raises(gpu_day.Skipped), report.row("sampling", "next", mode="bf16"):
        raise AssertionError("no time is left for it")
    content, table = read(tmp_path)
    assert content["rows"][0]["error"].startswith("TimeoutError") and content["rows"][0]["took"] < 10
    assert content["not_measured"] == ["sampling next bf16"] and "Not measured: sampling next bf16" in table

    status, _ = gpu_day.run([sys.executable, "-c", "import time; time.sleep(60)"], tmp_path / "log", 2)
    assert status == -signal.SIGTERM


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_what_it_runs_and_leaves_the_report_whole(tmp_path, number):
    """While a training, in a session of its own, is at work."""
    body = f"""
import sys
sys.path.append({str(BENCHMARKS)!r})
import gpu_day
gpu_day.train = lambda report, *_: sleep(report)
def sleep(report):
    with report.row("training", "train_prior") as row:
        program = "import time; print('at work', flush=True); time.sleep(60)"
        row["status"], _ = gpu_day.run([sys.executable, "-c", program], report.folder / "log.txt", 50)
sys.argv = ["gpu_day", "--device", "cpu", "--parts", "training", "--train", "tiny", "--output", {str(tmp_path)!r}]
gpu_day.main()
"""
    environment = os.environ | {"PYTHONPATH": str(BENCHMARKS.parent), "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen([sys.executable, "-c", body], env=environment)
    log = tmp_path / "log.txt"
    while not (log.exists() and log.read_text()):
        assert process.poll() is None
        time.sleep(0.1)
    (child,) = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    process.send_signal(number)
    assert process.wait(30) == 128 + number and not Path(f"/proc/{child}").exists()
    content, table = read(tmp_path)
    assert [row["error"] for row in content["rows"]] == ["interrupted"] and not content["finished"]
    assert "| train_prior | interrupted |" in table and "what comes after this" in table


@pytest.mark.parametrize("warmup, fraction", [(0.1, 0.1), (5000, 0.05)])
def test_a_training_for_a_time_ends_with_its_schedule(gpu_day, tmp_path, warmup, fraction):
    experiment = str(write_experiment(tmp_path))
    schedule = ["lr_scheduler.name=cosine", f"lr_scheduler.num_warmup_steps={warmup}"]
    settings = gpu_day.in_time(load_config(experiment, schedule, tool="train_prior"), 3723, 0.5)
    config = load_config(experiment, [*schedule, *settings], tool="train_prior")
    assert config.trainer.max_time == "00:01:02:03" and config.trainer.max_steps == 7446
    assert config.checkpoint_every_n_steps == 120 and config.lr_scheduler.num_warmup_steps == fraction
    assert gpu_day.in_time(config, 60, None) == ["trainer.max_time=00:00:01:00"]  # the step could not be measured


def test_what_a_cut_leaves_is_whole(tmp_path):
    command = [sys.executable, str(BENCHMARKS / "gpu_day.py"), "--device", "cpu", "--minutes", "1", "--parts", "speed"]
    environment = os.environ | {"PYTHONPATH": str(BENCHMARKS.parent), "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        [*command, "--output", str(tmp_path)], stderr=subprocess.PIPE, text=True, env=environment
    )
    rows = 0
    for line in process.stderr:
        rows += line.startswith("part ")
        if rows == 8:
            break
    process.kill()
    process.wait()
    content, table = read(tmp_path)
    assert len(content["rows"]) >= 8 and not content["finished"] and content["tiny"]
    assert not any("error" in row for row in content["rows"])
    steps = [row for row in content["rows"] if row["part"] == "training step"]
    assert steps and all(row["seconds"] > 0 and 0 < row["TFLOP/s"] for row in steps)
    assert all(f"| {row['name']} | {row['mode']} |" in table for row in steps) and "tiny models" in table
