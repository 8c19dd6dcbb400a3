"""Installed as a wheel, installed editable, beside HuggingFace's packages of the same names; run from anywhere."""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import latentcast

ROOT = Path(__file__).parents[1]
FOLDERS = ("latentcast", "tokenizers", "priors", "pipelines", "configs")

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


def run(*command, cwd, path=None):
    """Standard output of a command that must succeed."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    if path is not None:
        environment["PYTHONPATH"] = str(path)
    command = [sys.executable, *map(str, command)]
    done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def sources():
    """Every file of the package, by its place inside an installed ``latentcast``."""
    for folder in FOLDERS:
        for file in sorted((ROOT / folder).rglob("*")):
            if file.suffix in (".py", ".yaml", ".j2", ".html"):
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


def test_the_wheel_works_beside_transformers(wheel, tmp_path):
    site, elsewhere = tmp_path / "site", tmp_path / "elsewhere"
    elsewhere.mkdir()
    run("-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--target", site, wheel, cwd=elsewhere)
    (elsewhere / "program.py").write_text(PROGRAM)
    assert "all well" in run("program.py", site, cwd=elsewhere, path=site)


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
