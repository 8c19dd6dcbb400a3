"""Installed as a wheel, installed editable, beside HuggingFace's packages of the same names; run from anywhere; and the
command ``latentcast``, which needs no checkout."""

import importlib.metadata
import json
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import yaml
from tiny_experiment import write_experiment

import latentcast
from latentcast.config import stage_config, to_container

ROOT = Path(__file__).parents[1]
FOLDERS = ("latentcast", "tokenizers", "priors", "pipelines", "configs", "tools")
CONFIGS = {
    "tokenizers": "tokenizer",
    "priors": "prior",
    "experiments": "experiment",
    "protocols": "protocol",
    "data": "data",
}

# Run with the wheel and with the editable install: argv[1] is the folder that everything of ours must come from.
PROGRAM = """
import multiprocessing, pickle, sys
from pathlib import Path


def name_of(model):
    return type(model).__name__ + " in " + multiprocessing.current_process().name


if __name__ == "__main__":
    import tokenizers, transformers  # HuggingFace's
    from latentcast import VQVAE, PixelTokenizer, VideoTransformer, VideoPredictionPipeline
    from latentcast import instantiate, load_config, load_model
    import latentcast.tokenizers.quantizers.sliced as nested
    from latentcast.config import config_root

    home = Path(sys.argv[1]).resolve()
    assert hasattr(tokenizers, "Tokenizer") and hasattr(transformers, "AutoTokenizer")
    assert home / "tokenizers" not in Path(tokenizers.__file__).resolve().parents, tokenizers.__file__
    for module in (sys.modules["latentcast"], sys.modules["latentcast.pipelines.base"], nested):
        assert home in Path(module.__file__).resolve().parents, module.__file__
    assert home in config_root().resolve().parents
    if (home / "latentcast/tools").is_dir():  # of a wheel; the repository that it may lie in is another's
        from latentcast.environment import git_commit

        assert git_commit() is None

    config = load_config("lvt_bair")
    assert config.prior._target_ == "latentcast.VideoTransformer"
    assert isinstance(instantiate({"_target_": "latentcast.PixelTokenizer"}), PixelTokenizer)
    for cls in (VQVAE, VideoTransformer, VideoPredictionPipeline):
        assert cls.__module__ == "latentcast"
        assert pickle.loads(pickle.dumps(cls)) is cls
    model = PixelTokenizer(1, 4, 4)
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        assert pool.apply(name_of, (model,)).startswith("PixelTokenizer in Spawn")
    print("all well")
"""


def run(*command, cwd, path=None, **others):
    """Standard output of a command that must succeed."""
    return ended(sys.executable, *command, cwd=cwd, path=path, **others)[0]


def ended(*command, cwd, path=None, status=0, **environment):
    """-> [standard output, standard error] of a command with that exit status."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | environment
    if path is not None:
        environment["PYTHONPATH"] = str(path)
    command = list(map(str, command))
    done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == status, done.stdout + done.stderr
    return done.stdout, done.stderr


def sources():
    """Every file of the package, by its place inside an installed ``latentcast``."""
    for folder in FOLDERS:
        for file in sorted((ROOT / folder).rglob("*")):
            if file.suffix in (".py", ".yaml", ".j2", ".html", ".typed"):
                inside = file.relative_to(ROOT).as_posix()
                yield inside if folder == "latentcast" else f"latentcast/{inside}"


def copy_checkout(folder):
    leave_out = shutil.ignore_patterns(".*", "__pycache__", "runs", "build", "dist", "*.egg-info", "wandb")
    shutil.copytree(ROOT, folder, ignore=leave_out)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """The wheel, built the long way round: checkout -> source distribution -> wheel."""
    root = tmp_path_factory.mktemp("build")
    copy_checkout(root / "checkout")
    run("-m", "build", "--no-isolation", "--outdir", root / "dist", root / "checkout", cwd=root)
    assert len(list((root / "dist").glob("*.tar.gz"))) == 1
    return next((root / "dist").glob("*.whl"))


def test_the_wheel_holds_everything_and_nothing_beside_latentcast(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.split("/")[0] for name in names} == {"latentcast", f"latentcast-{latentcast.__version__}.dist-info"}
    assert sorted(name for name in names if name.startswith("latentcast/")) == sorted(sources())


@pytest.fixture(scope="module")
def site(wheel, tmp_path_factory):
    """A folder of packages with the wheel in it, in a repository of somebody else's."""
    root = tmp_path_factory.mktemp("installed")
    run("-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--target", root / "site", wheel, cwd=root)
    if shutil.which("git"):
        identity = ["-c", "user.name=somebody", "-c", "user.email=else"]
        for words in (["init", "--quiet"], [*identity, "commit", "--quiet", "--allow-empty", "--message", "theirs"]):
            subprocess.run(["git", *words], cwd=root, check=True)
    return root / "site"


def test_the_wheel_works_beside_transformers(site, tmp_path):
    (tmp_path / "program.py").write_text(PROGRAM)
    assert "all well" in run("program.py", site, cwd=tmp_path, path=site)


@pytest.fixture
def called(site, tmp_path):
    """Run ``called(*words)`` as ``latentcast WORDS`` of the wheel, in an empty folder -> see ``ended``."""
    return lambda *words, **options: ended(site / "bin/latentcast", *words, cwd=tmp_path, path=site, **options)


def test_the_commands_help_names_every_tool(called):
    out, _ = called("--help")
    for tool in (ROOT / "tools").glob("*.py"):
        assert re.search(rf"^ +{tool.stem.replace('_', '-')}(\s|$)", out, re.MULTILINE), tool
    assert re.search(r"^ +train-prior +Train a prior$", out, re.MULTILINE)
    assert "usage: latentcast train-prior [-h] [--debug]" in called("train-prior", "--help")[0]
    assert "latentcast fetch-weights" in " ".join(called("evaluate", "--help")[0].split())
    assert called("--version")[0].split() == ["latentcast", latentcast.__version__]
    assert "no command 'train-priors'; did you mean 'train-prior'?" in called("train-priors", "x", status=2)[1]
    assert called(status=2)[1] == out


@pytest.mark.parametrize("words", [["--help"], ["list"], ["evaluate", "--help"], ["config", "quickstart"]])
def test_the_command_loads_nothing_that_takes_seconds(site, tmp_path, words):
    code = f"""
import runpy, sys
sys.argv = ["latentcast", *{words}]
try:
    runpy.run_module("latentcast", run_name="__main__")
except SystemExit as ended:
    assert not ended.code
heavy = {{"torch", "diffusers", "pytorch_lightning", "numpy", "av", "wandb"}} & set(sys.modules)
assert not heavy, heavy
"""
    assert "quickstart" in run("-c", code, cwd=tmp_path, path=site)


def test_list_has_every_config_with_what_its_first_line_says(called, site, tmp_path):
    found = json.loads(called("list", "--json")[0])
    for kind, folder in CONFIGS.items():
        paths = sorted((ROOT / "configs" / folder).rglob("*.yaml"))
        assert sorted(found[kind]) == sorted(str(path.relative_to(ROOT / "configs" / folder))[:-5] for path in paths)
        assert all(found[kind].values())
    assert found["data"]["kth"] == "KTH actions, grey"
    assert ended("bash", "-c", f"'{site / 'bin/latentcast'}' list | :", cwd=tmp_path, path=site) == ("", "")
    out, _ = called("list", "experiments", COLUMNS="80")
    assert max(map(len, out.splitlines())) <= 80
    assert re.search(r"^  quickstart +One moving handwritten digit", out, re.MULTILINE) and "vqvae" not in out.split()


def test_config_prints_what_the_tools_compose(called, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # what a run in ./runs was trained with would count
    for stage in ("tokenizer", "prior"):
        overrides = ["prior.n_layers=4", "train_prior.batch_size=3"]
        out, _ = called("config", "quickstart", *overrides, "--stage", stage)
        assert yaml.safe_load(out) == to_container(stage_config("quickstart", overrides, stage))
        assert (yaml.safe_load(out)["batch_size"] == 3) == (stage == "prior")
    (tmp_path / "mine.yaml").write_text(out)  # itself an experiment
    assert to_container(stage_config(tmp_path / "mine.yaml", [], "prior")) == yaml.safe_load(out)
    words = ["shrvqvae_tiny", "joint=true", "data=video_folder"]
    joint = yaml.safe_load(called("config", *words)[0])
    assert joint == to_container(stage_config(words[0], words[1:], "prior"), whole=False)
    assert joint["joint"] is True and joint["data"]["root"] == "???"


def test_doctor_says_what_is_there_and_what_is_missing(called, tmp_path):
    found = json.loads(called("doctor", "--json", LATENTCAST_WEIGHTS=str(tmp_path), XDG_CACHE_HOME=str(tmp_path))[0])
    assert found["latentcast"]["version"] == latentcast.__version__
    assert found["packages"]["torch"] == importlib.metadata.version("torch") and "argcomplete" in found["packages"]
    assert not {"pytest", "selenium"} & set(found["packages"])  # of the extra dev
    assert found["cpu"]["threads"] >= 1 and found["disk"]["cache"]["free_gb"] > 0
    assert "h264" in found["video"]["PyAV"]["decoders"].split()
    assert found["weights"] == dict.fromkeys(["i3d_k400", "lpips_alex", "lpips_vgg16", "i3d_torchscript"])
    assert [line for line in found["problems"] if line.endswith("get them by latentcast fetch-weights")]


def test_a_wheel_trains_and_names_its_commands(called, tmp_path):
    experiment = write_experiment(tmp_path)
    figures = json.loads(called("train-tokenizer", experiment, "trainer.max_steps=2")[0].splitlines()[-1])
    assert figures["steps"] == 2 and (tmp_path / "run/tokenizer/config.json").is_file()
    first = (tmp_path / "run/config.yaml").read_text().partition("\n")[0]
    assert first == f"# latentcast train-tokenizer {experiment} trainer.max_steps=2"
    _, err = called("evaluate", "quickstart", "protocol=one_digit", status=1)
    assert "runs/quickstart/pipeline: no pipeline here; run latentcast train-prior first" in err


def test_quickstart_starts_the_others_as_it_was_started(called):
    _, err = called("quickstart", "prior.n_layer=4", status=1)
    assert "did you mean 'prior.n_layers'?" in err and "train_tokenizer failed; its error stands above" in err


@pytest.fixture
def completed(called, site, tmp_path):
    """``completed(line)``: what bash offers after a line that is typed so far."""
    script = (
        called("completion", "bash")[0]
        + """
COMP_LINE="$1" COMP_POINT=${#1} COMP_TYPE=9
_python_argcomplete latentcast
printf '%s\\n' "${COMPREPLY[@]}"
"""
    )
    path = f"{site / 'bin'}{os.pathsep}{os.environ['PATH']}"
    return lambda line: sorted(ended("bash", "-c", script, "-", line, cwd=tmp_path, path=site, PATH=path)[0].split())


def test_bash_completes_tools_experiments_and_overrides(completed, tmp_path):
    assert completed("latentcast train") == ["train-prior", "train-tokenizer"]
    assert {"sample", "list", "doctor", "config"} <= set(completed("latentcast "))
    assert completed("latentcast train-prior quick") == ["quickstart"]
    assert completed("latentcast config small/s") == ["small/st_pixelcnn", "small/stdiff", "small/svg_lp"]
    assert completed("latentcast train-prior quickstart pri") == ["prior="]
    assert completed("latentcast train-prior quickstart prior=s") == ["sde_diffusion", "st_pixelcnn"]  # "=" ends a word
    assert completed("latentcast evaluate quickstart protocol=one") == ["one_digit"]
    assert completed("latentcast evaluate --pipeline x --data smm") == ["smmnist", "smmnist32"]
    assert completed("latentcast prepare-dataset k") == ["kinetics600", "kitti", "kth"]
    assert completed("latentcast list p") == ["priors", "protocols"]
    assert completed("latentcast sample --deb") == ["--debug"]
    (tmp_path / "mine.yaml").touch()
    assert completed("latentcast train-prior mi") == ["mine.yaml"]


@pytest.mark.parametrize(
    "shell, line, between", [("fish", "complete --command latentcast", "\t"), ("zsh", "compdef", ":")]
)
def test_other_shells_show_what_a_name_is(called, site, tmp_path, shell, line, between):
    assert line in called("completion", shell)[0]
    typed = "latentcast train-prior quick"
    asked = {"COMP_LINE": typed, "COMP_POINT": str(len(typed))}  # what its script says, by which the shell asks
    asked |= {"_ARGCOMPLETE": "1", "_ARGCOMPLETE_SHELL": shell, "_ARGCOMPLETE_SUPPRESS_SPACE": "1"}
    asked |= {"_ARGCOMPLETE_DFS": between} if shell == "fish" else {}
    command = ["bash", "-c", '"$0" 8>&1 >/dev/null', site / "bin/latentcast"]
    out, _ = ended(*command, cwd=tmp_path, path=site, **asked)
    assert out.startswith(f"quickstart{between}One moving handwritten digit")


def test_the_checkout_works_beside_transformers(tmp_path):
    # The repository's root comes first on the path, where a folder called tokenizers stands.
    (tmp_path / "program.py").write_text(PROGRAM)
    assert "all well" in run(tmp_path / "program.py", ROOT, cwd=ROOT, path=ROOT)


def test_an_editable_install_is_a_path_which_no_folder_beside_a_script_goes_before(tmp_path):
    copy_checkout(tmp_path / "latentcast")
    code = f"from setuptools.build_meta import build_editable; build_editable({str(tmp_path)!r})"
    run("-c", code, cwd=tmp_path / "latentcast")
    with zipfile.ZipFile(next(tmp_path.glob("*.whl"))) as editable:
        (name,) = (name for name in editable.namelist() if ".dist-info/" not in name)
        assert name.endswith(".pth") and editable.read(name).decode().strip() == str(tmp_path / "latentcast")


def test_tools_run_from_anywhere(tmp_path):
    tools = sorted((ROOT / "tools").glob("*.py"))
    assert {"train_tokenizer", "encode_dataset", "train_prior", "sample"} <= {tool.stem for tool in tools}
    for tool in tools:
        assert "usage:" in run(tool, "--help", cwd=tmp_path)


def test_every_public_name_is_there():
    for name in latentcast.__all__:
        assert getattr(latentcast, name) is not None
    assert set(latentcast.__all__) <= set(dir(latentcast))
    with pytest.raises(AttributeError, match="module 'latentcast' has no attribute 'VQVEA'"):
        latentcast.VQVEA  # noqa: B018


def test_importing_latentcast_is_cheap(tmp_path):
    code = "import sys, latentcast; assert not {'torch', 'diffusers', 'pytorch_lightning'} & set(sys.modules)"
    run("-c", code, cwd=tmp_path)


def test_stage_folders_are_no_packages_of_their_own():
    # With an __init__.py the folder would win over HuggingFace's package of the same name.
    assert not [folder for folder in FOLDERS[1:] if (ROOT / folder / "__init__.py").exists()]
