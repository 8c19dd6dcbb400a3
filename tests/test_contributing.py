"""CONTRIBUTING.md, followed to the letter in a copy of the repository: a new tokenizer and a new prior."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from tiny_experiment import EXPERIMENT

ROOT = Path(__file__).parents[1]
COPIED = "latentcast tokenizers priors pipelines configs tools tests docs/templates pyproject.toml".split()


@pytest.fixture(scope="module")
def checkout(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkout")
    for name in COPIED:
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        copy(ROOT / name, folder / name)
    return folder


def run(command, folder):
    """A command of CONTRIBUTING in the copy -> stdout."""
    command = re.sub(r"^python ", f"{sys.executable} ", command)
    environment = os.environ | {"PYTHONPATH": str(folder), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, shell=True, cwd=folder, capture_output=True, text=True, timeout=200, env=environment)
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def follow(heading, folder):
    """Do what a section of CONTRIBUTING says -> the stdouts of its commands."""
    section = (ROOT / "CONTRIBUTING.md").read_text().partition(f"## {heading}\n")[2].partition("\n## ")[0]
    outputs = []
    for kind, block in re.findall(r"^ *```(\w+)\n(.*?)^ *```", section, re.DOTALL | re.MULTILINE):
        lines = [line.strip() for line in block.strip().splitlines()]
        if kind == "sh":
            outputs += [run(line, folder) for line in lines]
        elif kind == "yaml":
            (folder / lines[0].removeprefix("# ")).write_text("\n".join(lines[1:]) + "\n")
        else:
            place, name = re.fullmatch(r"# in (\S+), (\w+)", lines[0]).groups()
            text = (folder / place).read_text()
            opening = f"\n{name} = {{\n"
            assert text.count(opening) == 1
            (folder / place).write_text(text.replace(opening, f"{opening}    {lines[1]}\n"))
    return outputs


@pytest.mark.parametrize("what", ["tokenizer", "prior"])
def test_a_model_is_added_by_the_text_alone_and_trains(checkout, what):
    outputs = follow(f"Adding a {what}", checkout)
    passed = re.search(r"(\d+) passed", outputs[-1])
    assert int(passed[1]) >= 10 and "failed" not in outputs[-1]
    experiment = EXPERIMENT | {"run_dir": str(checkout / f"run_{what}")}
    if what == "prior":  # over pixels, which need no first stage
        experiment |= {"prior": {}, "tokenizer": {"levels": None}}
        experiment["defaults"] = experiment["defaults"] | {"tokenizer": "pixel", "prior": "my_prior"}
    else:
        experiment |= {"tokenizer": {"latent_channels": 4}}
        experiment["defaults"] = experiment["defaults"] | {"tokenizer": "my_tokenizer"}
    (checkout / "tiny.yaml").write_text(yaml.safe_dump(experiment))
    figures = json.loads(run(f"python tools/train_{what}.py tiny.yaml", checkout).splitlines()[-1])
    assert figures["steps"] == 4 and figures["val"]["loss"] > 0
