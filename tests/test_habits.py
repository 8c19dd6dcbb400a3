"""What stands beside the code: workflows, forms, pins, citation."""

import os
import re
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml
from doc_blocks import check_pip
from tiny_experiment import ROOT

import latentcast

FORMS = sorted((ROOT / ".github/ISSUE_TEMPLATE").glob("*.yml"))
WORKFLOWS = sorted((ROOT / ".github/workflows").glob("*.yml"))
FILES = [*FORMS, *WORKFLOWS, *(ROOT / name for name in (".pre-commit-config.yaml", "CITATION.cff", "mkdocs.yml"))]


def name_of(requirement):
    """A distribution's name in its one form: "mkdocstrings[python]>=0.27" -> "mkdocstrings"."""
    return re.sub(r"[-_.]+", "-", re.match(r"[\w.-]+", requirement)[0]).lower()


PINS = dict(line.split("==") for line in (ROOT / "constraints.txt").read_text().split())


def steps(workflow):
    content = yaml.safe_load((ROOT / f".github/workflows/{workflow}.yml").read_text())
    (job,) = content["jobs"].values()
    return job, [step["run"] for step in job["steps"] if "run" in step]


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_files_parse(path):
    assert isinstance(yaml.safe_load(path.read_text(encoding="utf-8")), dict)


def test_ci_calls_the_one_script_on_all_machines():
    job, commands = steps("ci")
    assert commands == [".ci/run"] and os.access(ROOT / ".ci/run", os.X_OK)
    assert job["strategy"]["matrix"]["python"] == ["3.11", "3.12", "3.13"]
    assert job["strategy"]["matrix"]["os"] == ["ubuntu-latest", "macos-latest"]
    assert tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["ruff"]["target-version"] == "py311"


def installed(workflow):
    """The distributions that a workflow's pip installs, by their names."""
    found = set()
    for command in steps(workflow)[1]:
        if command.startswith("pip install"):
            words = shlex.split(command, comments=True)
            check_pip(words[1:])
            assert words[2:4] == ["-c", "constraints.txt"]
            found |= {name_of(word) for word in words[4:]}
    return found


def test_what_workflows_install_is_pinned():
    pinned = {name_of(name) for name in PINS}
    assert installed("release") == {"build", "twine"} and installed("release") < pinned
    extra = re.search(r'"docs": \[(.*?)\],', (ROOT / "setup.py").read_text())[1]
    assert installed("docs") == {name_of(name) for name in re.findall(r'"(.+?)"', extra)} < pinned


def test_pre_commit_runs_the_ruff_that_is_pinned():
    (ruff,) = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"]
    assert ruff["rev"] == f"v{PINS['ruff']}" and [hook["id"] for hook in ruff["hooks"]] == ["ruff-check", "ruff-format"]


@pytest.mark.parametrize("tag, right", [("v{}", True), ("{}", False), ("v{}.1", False)])
def test_a_release_has_the_version_of_its_tag(tag, right):
    (command,) = (command for command in steps("release")[1] if "__version__" in command)
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environment = os.environ | {"GITHUB_REF_NAME": tag.format(latentcast.__version__), "PATH": path}
    assert (subprocess.run(["bash", "-c", command], cwd=ROOT, env=environment).returncode == 0) == right


def test_the_citation_has_the_version_and_the_five_papers():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert citation["version"] == latentcast.__version__ and citation["cff-version"] == "1.2.0"
    assert {"message", "title", "authors"} <= citation.keys()
    found = [paper["identifiers"][0]["value"] for paper in citation["references"]]
    assert sorted(name for name in found if re.fullmatch(r"arXiv:\d{4}\.\d{5}", name)) == [
        "arXiv:2006.10704",
        "arXiv:2203.09481",
        "arXiv:2307.06701",
        "arXiv:2312.06486",
    ]
    assert len(found) == 5 and len({paper["title"] for paper in citation["references"]}) == 5
    assert all(
        author.keys() == {"given-names", "family-names"} for p in citation["references"] for author in p["authors"]
    )


@pytest.mark.parametrize("path", [path for path in FORMS if path.name != "config.yml"], ids=lambda path: path.name)
def test_forms_ask_for_what_doctor_says(path):
    form = yaml.safe_load(path.read_text(encoding="utf-8"))
    assert {"name", "description", "body"} <= form.keys()
    fields = {field["id"]: field for field in form["body"]}
    assert len(fields) == len(form["body"]) and all(field["type"] == "textarea" for field in form["body"])
    assert "`latentcast doctor`" in fields["doctor"]["attributes"]["label"]
