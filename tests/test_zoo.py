"""Pipelines that are handed on: export, example clips, card, and the demo that predicts them."""

import json
import re
from pathlib import Path

import pytest
import torch
from tiny import small_recurrent_vae
from tiny_experiment import ROOT, TOOLS, Started, finished

from latentcast import PixelTokenizer, VideoPredictionPipeline
from latentcast.catalogue import described
from latentcast.zoo import N_EXAMPLES, example_psnr, export, read_examples

ZOO = sorted(path.parent for path in ROOT.glob("zoo/*/README.md"))


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    torch.manual_seed(0)
    prior = small_recurrent_vae(PixelTokenizer(1, 16, 16, levels=None).latent_spec, aligner="none").eval()
    clips = (torch.randint(256, (N_EXAMPLES, 7, 1, 16, 16)) / 127.5) - 1
    entry = {"mean": 15.8, "ci95": [15.6, 16.0]}
    metrics = {"psnr": entry, "lpips": entry | {"mean_of_samples": {"mean": 0.125, "ci95": None}}}
    protocol = {"n_context": 3, "n_predicted": 4, "n_samples": 2}
    results = {"small": {"protocol": protocol, "data": {"n_clips": 9}, "metrics": metrics}}
    folder = tmp_path_factory.mktemp("zoo") / "tiny"
    text = {"title": "A tiny SVG-LP.", "command": "python tools/train_prior.py tiny", "licence": "MIT (data: noise)"}
    found = export(VideoPredictionPipeline(prior, n_context=3, fps=10), folder, clips, results, **text)
    return folder, clips, found, results


def test_an_exported_pipeline_gives_its_cards_figure_again(exported):
    folder, clips, found, results = exported
    assert torch.equal(read_examples(folder), clips)
    pipe = VideoPredictionPipeline.from_pretrained(folder)
    assert example_psnr(pipe, read_examples(folder)) == pytest.approx(found, abs=0.01)
    assert json.loads((folder / "metrics.json").read_text()) == {"small": results["small"]["metrics"]}
    card = (folder / "README.md").read_text()
    for line in ("license: mit", "# tiny", f"example clips: {found:.2f} dB", "| psnr | 15.8 | 15.6 to 16 |"):
        assert line in card
    assert json.loads((folder / "model_index.json").read_text())["_name_or_path"] == "tiny"
    assert "| lpips, mean of samples | 0.125 |  |" in card and "python tools/train_prior.py tiny" in card
    weights = next((folder / "prior").glob("*.safetensors")).stat().st_size
    assert weights < 2.5 * sum(p.numel() for p in pipe.prior.parameters()) + 20_000  # two bytes each


def test_the_demo_predicts_the_example_clips(exported, tmp_path):
    options = "--pipeline", exported[0], "--num-samples", "2"
    status, figures, err = finished(Started(TOOLS / "demo.py", *options, cwd=tmp_path))
    assert status == 0, err
    files = figures["files"]
    assert {Path(path).suffix for path in files.values()} == {".gif", ".png"}
    assert all((tmp_path / path).stat().st_size > 500 for path in files.values())


def test_a_pipeline_without_examples_is_named(tmp_path):
    with pytest.raises(OSError, match=r"examples.safetensors: expected example clips"):
        read_examples(tmp_path)


@pytest.mark.parametrize("folder", ZOO, ids=lambda folder: folder.name)
def test_the_zoos_cards_are_true(folder):
    pipe = VideoPredictionPipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    said = re.search(r"example clips: ([\d.]+) dB", (folder / "README.md").read_text())[1]
    clips = read_examples(folder)
    assert len(clips) == N_EXAMPLES and example_psnr(pipe, clips) == pytest.approx(float(said), abs=0.1)
    assert json.loads((folder / "metrics.json").read_text()).keys() <= described("protocol").keys()


def test_the_zoo_is_small():
    def size(folder, pattern):
        return sum(file.stat().st_size for file in folder.rglob(pattern) if file.is_file())

    for folder in ZOO:
        assert size(folder, "diffusion_pytorch_model.safetensors") <= 4 * 2**20, folder
    assert size(ROOT / "zoo", "*") <= 30_000_000
