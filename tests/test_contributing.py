"""CONTRIBUTING.md, followed to the letter in a copy of the repository: a new tokenizer and a new prior."""

import os
import re
import shlex
import shutil
import subprocess
import sys

from doc_blocks import blocks
from tiny_experiment import ROOT

COPIED = "latentcast tokenizers priors pipelines configs tools tests docs/templates pyproject.toml".split()
TRAINING = """
import tiny_experiment
from latentcast import load_model


def train(tool, folder, monkeypatch, **changes):
    defaults = tiny_experiment.EXPERIMENT["defaults"] | changes.pop("defaults")
    monkeypatch.setattr(tiny_experiment, "EXPERIMENT", tiny_experiment.EXPERIMENT | changes | {"defaults": defaults})
    return tiny_experiment.call_tool(tool, folder)


def test_my_tokenizer_trains(tmp_path, monkeypatch):
    changes = {"defaults": {"tokenizer": "my_tokenizer"}, "tokenizer": {"latent_channels": 4}, "prior": None}
    figures = train("train_tokenizer", tmp_path, monkeypatch, **changes)
    assert figures["steps"] == 4 and type(load_model(figures["tokenizer"])).__name__ == "MyTokenizer"


def test_my_prior_trains(tmp_path, monkeypatch):  # over pixels, which need no first stage
    changes = {"defaults": {"tokenizer": "pixel", "prior": "my_prior"}, "tokenizer": {"levels": None}, "prior": {}}
    figures = train("train_prior", tmp_path, monkeypatch, **changes)
    assert figures["steps"] == 4 and type(load_model(figures["prior"])).__name__ == "MyPrior"
"""


def follow(heading, folder):
    """Do what a section of CONTRIBUTING says in a copy of the repository -> its calls of pytest, which are left."""
    left = []
    for block in blocks("CONTRIBUTING.md"):
        if block.heading != heading:
            continue
        first, *lines = block.text.strip().splitlines()
        if block.kind == "yaml":
            (folder / first.removeprefix("# ")).write_text("\n".join(lines) + "\n")
        elif block.kind == "python":
            place, name = re.fullmatch(r"# in (\S+), (\w+)", first).groups()
            text, opening = (folder / place).read_text(), f"\n{name} = {{\n"
            assert text.count(opening) == 1 and len(lines) == 1
            (folder / place).write_text(text.replace(opening, f"{opening}    {lines[0]}\n"))
        elif first.startswith("python -m pytest -q "):
            left.append(first.removeprefix("python -m pytest -q "))
        else:
            subprocess.run(first, shell=True, cwd=folder, check=True)
    return left


def test_a_tokenizer_and_a_prior_are_added_by_the_text_alone_and_train(tmp_path):
    for name in COPIED:
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        copy(ROOT / name, tmp_path / name)
    calls = [call for what in ("tokenizer", "prior") for call in follow(f"Adding a {what}", tmp_path)]
    files, chosen = zip(*(call.split(" -k ") for call in calls))
    assert chosen == ("my_tokenizer", "my_prior")
    (tmp_path / "tests/test_training_them.py").write_text(TRAINING)
    command = [sys.executable, "-m", "pytest", "-v", "-p", "no:cacheprovider", *files, "tests/test_training_them.py"]
    environment = os.environ | {"PYTHONPATH": str(tmp_path), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, "-k", " or ".join(chosen)],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=280,
        env=environment,
    )
    assert done.returncode == 0, f"{shlex.join(command)}\n{done.stdout}\n{done.stderr}"
    for what in (*(f"[{name}]" for name in chosen), "test_my_tokenizer_trains", "test_my_prior_trains"):
        assert what in done.stdout
    assert " skipped" not in done.stdout
