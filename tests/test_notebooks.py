"""The notebooks of examples/, executed at tiny size."""

import functools
import json

import pytest
from doc_blocks import DIGITS, EVALUATION, TRAINING
from tiny_experiment import ROOT
from video_files import counter_frames, encode

nbformat = pytest.importorskip("nbformat", reason="the extra latentcast[dev] is not installed")
nbclient = pytest.importorskip("nbclient", reason="the extra latentcast[dev] is not installed")
from jupyter_core.utils import run_sync  # noqa: E402

NOTEBOOKS = sorted((ROOT / "examples").glob("*.ipynb"))
ONE_DIGIT = f"{EVALUATION} protocol.frame_size=16 protocol.best_of=[]"
VIDEOS = f"protocol=video_folder {EVALUATION} evaluation.sampler.n_steps=2 preview.sampler.n_steps=2"
SMALL_DIFFUSION = "prior.width=16 prior.denoising_multipliers=[1]"
SMALL_PRIOR = "prior.dim=16 prior.n_layers=1"
PARAMETERS = {  # notebook -> the overrides that its first cell is followed by
    "quickstart": [TRAINING, DIGITS, SMALL_PRIOR],
    "own_videos": [TRAINING, VIDEOS, SMALL_DIFFUSION],
    "swap_a_prior": [TRAINING, DIGITS, ONE_DIGIT, SMALL_PRIOR],
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
    for n in range(3):
        encode(folder / f"videos/{n}.mp4", counter_frames(16, first=20 * n))
    manager = nbclient.NotebookClient(nbformat.v4.new_notebook(), kernel_name="python3").create_kernel_manager()

    @functools.cache
    def executed(path):
        notebook = nbformat.read(path, 4)
        (place,) = (n for n, cell in enumerate(notebook.cells) if "parameters" in cell.metadata.get("tags", ()))
        given = f"overrides = {' '.join(PARAMETERS[path.stem]).split()}"
        notebook.cells.insert(place + 1, nbformat.v4.new_code_cell(given))
        notebook.cells.insert(0, nbformat.v4.new_code_cell("%reset -f"))  # of the notebook before
        resources = {"metadata": {"path": str(folder)}}
        nbclient.NotebookClient(notebook, timeout=200, km=manager, resources=resources).execute()
        return notebook.cells, folder

    with pytest.MonkeyPatch.context() as patch:
        for name in ("IPYTHONDIR", "JUPYTER_RUNTIME_DIR"):  # else in the user's home
            patch.setenv(name, str(folder / "jupyter"))
        yield executed
    run_sync(manager.shutdown_kernel)(now=True)


def shown(cell, kind):
    """What a cell shows of a kind, "image/png" say."""
    return [output["data"][kind] for output in cell.outputs if kind in output.get("data", {})]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_it_runs(executed, path):
    cells, folder = executed(path)
    code = [cell for cell in cells if cell.cell_type == "code"]
    errors = [output for cell in code for output in cell.outputs if output.output_type == "error"]
    assert not errors, [output for cell in code for output in cell.outputs]  # of tools, too, which end no notebook
    if path.stem == "quickstart":
        assert "[1, 4, 10, 1, 16, 16]" in shown(cells[-3], "text/plain")[0]
        assert len(shown(cells[-1], "image/png")) == 2
    elif path.stem == "own_videos":
        assert any(shown(cell, "image/png") for cell in code)
        assert "| copy_last_frame |" in shown(cells[-1], "text/markdown")[0]
    else:
        (table,) = shown(cells[-1], "text/markdown")
        assert "|  | video_transformer | masked_transformer | copy_last_frame |" in table
        for prior in ("video_transformer", "masked_transformer"):
            assert (folder / f"runs/{prior}/pipeline/model_index.json").is_file()
