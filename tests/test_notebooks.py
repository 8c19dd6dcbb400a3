"""The notebooks of examples/, executed at tiny size."""

import functools
import json

import pytest
from tiny_experiment import ROOT
from video_files import counter_frames, encode

nbformat = pytest.importorskip("nbformat", reason="the extra latentcast[dev] is not installed")
nbclient = pytest.importorskip("nbclient", reason="the extra latentcast[dev] is not installed")
from jupyter_core.utils import run_sync  # noqa: E402

NOTEBOOKS = sorted((ROOT / "examples").glob("*.ipynb"))
SHORT = "trainer.max_steps=1 trainer.accelerator=cpu trainer.limit_val_batches=1 trainer.precision=32-true logger=none "
SHORT += "batch_size=2 num_workers=0 preview.figures=[] preview.every_n_steps=0 "
DIGITS = "frame_size=32 data.digit_size=16 data.n_videos=4 data.n_heldout_videos=16 "
EVALUATION = "protocol.n_clips=2 protocol.n_samples=2 protocol.n_predicted=2 protocol.metrics=[psnr] "
EVALUATION += "protocol.best_of=[] "
PARAMETERS = {  # notebook -> what its first cell is followed by
    "quickstart": {"overrides": (SHORT + DIGITS + "prior.dim=16 prior.n_layers=1").split()},
    "own_videos": {"overrides": (SHORT + EVALUATION + "evaluation.sampler.n_steps=2").split()},
    "swap_a_prior": {"overrides": (SHORT + DIGITS + EVALUATION + "prior.dim=16 prior.n_layers=1").split()},
}


def test_each_has_parameters_and_stores_no_outputs():
    assert {path.stem for path in NOTEBOOKS} == PARAMETERS.keys()
    for path in NOTEBOOKS:
        cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
        assert [cell["metadata"].get("tags") for cell in cells if cell["metadata"]] == [["parameters"]]
        assert not any(cell.get("outputs") or cell.get("execution_count") for cell in cells)


@pytest.fixture(scope="module")
def executed(tmp_path_factory):
    """Notebook -> its cells after they ran, all in one folder and by one kernel, which imports torch once."""
    folder = tmp_path_factory.mktemp("notebooks")
    (folder / "videos").mkdir()
    for n in range(4):
        encode(folder / f"videos/{n}.mp4", counter_frames(16, first=20 * n))
    manager = nbclient.NotebookClient(nbformat.v4.new_notebook(), kernel_name="python3").create_kernel_manager()

    @functools.cache
    def executed(path):
        notebook = nbformat.read(path, 4)
        (place,) = (n for n, cell in enumerate(notebook.cells) if "parameters" in cell.metadata.get("tags", ()))
        given = "\n".join(f"{name} = {value!r}" for name, value in PARAMETERS[path.stem].items())
        notebook.cells.insert(place + 1, nbformat.v4.new_code_cell(given))
        notebook.cells.insert(0, nbformat.v4.new_code_cell("%reset -f"))  # of the notebook before
        resources = {"metadata": {"path": str(folder)}}
        nbclient.NotebookClient(notebook, timeout=200, km=manager, resources=resources).execute()
        return notebook.cells, folder

    yield executed
    run_sync(manager.shutdown_kernel)(now=True)


def shown(cell, kind):
    """What a cell shows of a kind, "image/png" say."""
    return [output["data"][kind] for output in cell.outputs if kind in output.get("data", {})]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_it_runs(executed, path):
    cells, folder = executed(path)
    assert all(cell.execution_count for cell in cells if cell.cell_type == "code")
    if path.stem == "quickstart":
        assert "[1, 4, 10, 1, 32, 32]" in shown(cells[-3], "text/plain")[0]
        assert len(shown(cells[-1], "image/png")) == 2
    elif path.stem == "own_videos":
        assert any(shown(cell, "image/png") for cell in cells if cell.cell_type == "code")
        assert "| copy_last_frame |" in shown(cells[-1], "text/markdown")[0]
    else:
        (table,) = shown(cells[-1], "text/markdown")
        assert "VideoTransformer" in table and "MaskedTransformer" in table
        for prior in ("video_transformer", "masked_transformer"):
            assert (folder / f"runs/{prior}/pipeline/model_index.json").is_file()
