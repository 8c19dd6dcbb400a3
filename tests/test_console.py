"""What a training says on stderr: one line what runs, then a bar or plain lines; and nothing of other libraries."""

import fcntl
import io
import logging
import os
import re
import struct
import subprocess
import sys
import termios

import pytest
from test_training import fit
from tiny_experiment import TOOLS, tiny_config, write_experiment

from latentcast import progress
from latentcast.progress import Bar
from latentcast.training import console
from latentcast.training.console import duration

BAR = "trainer.enable_progress_bar=true"
RUN = (
    r"tokenizer: VQVAE, [\d.]+k parameters; 4 steps of 8 clips; on cpu \(32-true\); "
    r"MovingDigits, 24 videos to train on, 8 to validate"
)


def test_a_tool_says_what_runs_how_far_it_is_and_nothing_else(tmp_path, monkeypatch):
    monkeypatch.setenv("MPLCONFIGDIR", str(tmp_path))  # as on a new machine, where matplotlib looks for fonts
    # A new interpreter: what libraries say depends on what is imported when.
    command = [sys.executable, TOOLS / "train_tokenizer.py", write_experiment(tmp_path), BAR, "wandb.mode=offline"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=150)
    assert done.returncode == 0, done.stderr
    expected = [
        f"tiny: loading; all goes to {tmp_path / 'run'}",
        r"no LPIPS of the reconstructions: .*",  # no weights at hand, or the frames are too small
        RUN,
        r"tokenizer: 4 of 4 steps \(100%\), loss [\d.]+, \d+ s in all, [\d.]+ (steps/s|s/step)",
        r"tokenizer, final validation: 100%, 1 of 1 steps in \d\d:\d\d, 00:00 left",
    ]
    lines = done.stderr.splitlines()
    assert len(lines) == 5 and all(map(re.fullmatch, expected, lines)), done.stderr


def test_a_run_that_will_take_long_is_announced_in_hours(tmp_path, monkeypatch, caplog, capsys):
    monkeypatch.setattr(console, "SETTLED", 0)
    monkeypatch.setattr(console, "WARM", 0)
    monkeypatch.setattr(console, "LONG", 0)
    monkeypatch.setattr(console, "EVERY", 0)
    monkeypatch.setattr(progress, "EVERY", 0)
    with caplog.at_level(logging.INFO, "latentcast"):
        fit(tiny_config(tmp_path, BAR))
    (line,) = [record.message for record in caplog.records if "at this pace" in record.message]
    assert re.fullmatch(r"tokenizer: at this pace 2 steps take \d+ s more; trainer.max_time=DD:HH:MM:SS or .*", line)
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("tokenizer")]
    steps = [
        re.match(r"tokenizer(?:, validating)?: (\d) of 4 steps \(\d+%\), loss [\d.]+, .* to go", line) for line in lines
    ]
    assert [int(found[1]) for found in steps if found] == [2, 3, 4]  # the first step tells nothing


def test_the_first_step_is_left_out_of_what_is_foretold():
    said = console.Console("tokenizer")
    said.first, said.began, said.total, said.timer = 0, 0.0, 102, None
    said.warm = None
    assert said.to_go(0, 5.0) is None
    said.warm = 1, 60.0  # which takes a minute
    assert said.to_go(1, 60.0) is None and said.to_go(2, 60.5) is None  # too little to tell
    assert said.to_go(2, 90.0) == pytest.approx(100 * 30.0)
    assert said.to_go(52, 70.0) == pytest.approx(50 * 10 / 51)


def test_the_time_that_a_run_may_take_is_said(tmp_path, caplog):
    caplog.set_level(logging.INFO, "latentcast")
    fit(tiny_config(tmp_path, BAR, "trainer.max_time=00:02:30:00", "trainer.max_steps=-1", "trainer.max_epochs=2"))
    assert "6 steps of 8 clips, 2.5 h at most; on cpu" in caplog.text
    over = ["trainer.max_time=00:00:00:01", f"run_dir={tmp_path}/over", "trainer.max_steps=100000"]
    fit(tiny_config(tmp_path, BAR, *over))
    assert re.search(r"tokenizer: trainer.max_time is over at step [1-9]", caplog.text)


@pytest.mark.parametrize(
    "seconds, text", [(5, "5 s"), (89, "89 s"), (720, "12 min"), (5000, "83 min"), (50000, "13.9 h")]
)
def test_times_are_said_as_they_are_read(seconds, text):
    assert duration(seconds) == text


def test_a_bar_is_a_plain_line_without_a_terminal(monkeypatch):
    file = io.StringIO()
    for _ in Bar(range(3), "encode", unit="frame", file=file):
        pass
    assert re.fullmatch(r"encode: 100%, 3 of 3 frames in 00:00, 00:00 left\n", file.getvalue())
    monkeypatch.setattr(progress, "EVERY", 0)
    file = io.StringIO()
    with Bar(desc="encode", total=3, unit="frame", file=file) as bar:
        for _ in range(3):
            bar.update(1)
    assert re.findall(r"(\d)%?, (\d) of 3 frames", file.getvalue()) == [("3", "1"), ("7", "2"), ("0", "3")]
    assert Bar(range(3), disable=True, file=file) is not None


@pytest.mark.parametrize("columns, longest", [(0, progress.WIDTH), (40, 40)])
def test_a_bar_fits_its_terminal_also_one_of_unknown_width(columns, longest):
    ours, theirs = os.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 0, columns, 0, 0))
    with open(theirs, "w") as terminal:
        for _ in Bar(range(3), "d" * 20, unit="frame", file=terminal):
            pass
        shown = ""
        while "3/3" not in shown:
            shown += os.read(ours, 4096).decode()
    os.close(ours)
    widths = [len(line) for line in re.split(r"[\r\n]+", shown)]
    assert longest - 2 <= max(widths) < longest


def test_a_bar_on_a_terminal_moves_in_its_place():
    ours, theirs = os.openpty()
    with open(theirs, "w") as terminal:
        for _ in Bar(range(3), "encode", unit="frame", file=terminal):
            pass
        shown = ""
        while "3/3" not in shown:
            shown += os.read(ours, 4096).decode()
    os.close(ours)
    assert "\rencode: 100%|" in shown
