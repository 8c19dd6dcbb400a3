"""What runs leave in W&B, read back from the files of offline runs, and the dashboard that shows it."""

import argparse
import json
import re
import runpy
import struct
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from tiny_experiment import TOOLS, call_tool

from latentcast.evaluation.protocol import METRICS
from latentcast.metrics.weights import find_weights
from latentcast.training import lineage
from latentcast.training.trackers import WandbRun, logged_in, summary_of

HEADER, BLOCK = 7, 32768
MEDIUM = r"/(_type|path|sha256|size|width|height|format|caption)$"  # what a row says of a picture
SETTINGS = {"mode": "offline", "project": "test", "entity": None, "group": None, "tags": [], "artifacts": True}
ON = ["wandb.mode=auto", "wandb.tags=[tiny]", "preview.every_n_steps=2", "frame_size=32"]
LAYERS = ["n_layers=2", "codebook_size=6", "hidden_channels=16", "residual_channels=8", "n_residual_blocks=1"]
LAYERS = ["tokenizer=hr_vqvae", *(f"tokenizer.{option}" for option in (*LAYERS, "embedding_dim=8", "stride=8"))]
CODES = ["dim=16", "n_blocks=1", "block_layers=1", "n_heads=2", "head_dim=8"]
CODES = ["prior=st_pixelcnn", *(f"prior.{option}" for option in CODES)]
GROUPS = ["dim=8", "hidden_channels=4", "n_groups=2", "group_dim=3", "cells=8"]
GROUPS = ["tokenizer=pixel", "prior=recurrent_vae", *(f"prior.{option}" for option in GROUPS)]
PROTOCOL = ["n_clips=4", "n_context=2", "n_predicted=4", "frame_size=32", "n_samples=2", "metrics=[mse,psnr,ssim,crps]"]
PROTOCOL = ["protocol=one_digit", *(f"protocol.{option}" for option in PROTOCOL)]


@pytest.fixture(scope="module")
def environment():
    with pytest.MonkeyPatch.context() as patch:
        yield patch


@pytest.fixture(scope="module", autouse=True)
def logged_out(environment, tmp_path_factory):
    """No account and no network: the tests must not send anything anywhere."""
    for name in ("WANDB_API_KEY", "WANDB_MODE", "WANDB_BASE_URL"):
        environment.delenv(name, raising=False)
    environment.setenv("NETRC", str(tmp_path_factory.mktemp("home") / "no-netrc"))


def read_records(path):
    """The records of a .wandb file, which is a LevelDB log: blocks of chunks (crc32, length, type, data)."""
    data, position, record = path.read_bytes(), HEADER, b""
    while position + 7 <= len(data):
        left = BLOCK - position % BLOCK
        if left < 7:
            position += left
            continue
        length, kind = struct.unpack_from("<HB", data, position + 4)
        record += data[position + 7 : position + 7 + length]
        position += 7 + length
        if kind in (1, 4):  # a whole record, or the last chunk of one
            from wandb.proto import (
                wandb_internal_pb2,
            )  # here: wandb takes seconds, of every process that collects tests

            parsed = wandb_internal_pb2.Record()
            parsed.ParseFromString(record)
            yield parsed
            record = b""


@dataclass
class Read:
    """What a W&B folder holds."""

    folder: Path
    run: object = None
    config: dict = field(default_factory=dict)
    rows: list = field(default_factory=list)  # a picture's entries are called name/_type, name/path and so on
    metrics: dict = field(default_factory=dict)  # name -> definition
    artifacts: dict = field(default_factory=dict)  # type -> record

    @property
    def keys(self):
        """What was logged, a picture by its name."""
        return {re.sub(MEDIUM, "", key) for row in self.rows for key in row}


def read_run(folder):
    """-> Read"""
    (path,) = folder.glob("*.wandb")
    for _ in range(100):  # wandb's own process writes it, and may still be at it after the run is closed
        records = list(read_records(path))
        if any(record.WhichOneof("record_type") == "exit" for record in records):
            break
        time.sleep(0.1)
    read = Read(folder)
    for record in records:
        kind = record.WhichOneof("record_type")
        updates = record.run.config.update if kind == "run" else record.config.update if kind == "config" else []
        for item in updates:
            read.config[item.key or "/".join(item.nested_key)] = json.loads(item.value_json)
        if kind == "run":
            read.run = record.run
        elif kind == "history":
            items = record.history.item
            read.rows.append({item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in items})
        elif kind == "metric":
            read.metrics[record.metric.name] = record.metric
        elif kind == "artifact":
            read.artifacts[record.artifact.type] = record.artifact
    return read


def read_all(folder):
    """The runs of a ``run_dir``, in the order in which they were made."""
    folders = sorted((folder / "wandb").glob("offline-run-*"), key=lambda path: path.stat().st_mtime_ns)
    return [read_run(found) for found in folders]


@pytest.fixture(scope="module")
def chain(tmp_path_factory, logged_out):
    """Both stages, the cache between them, a resumed prior and an evaluation: [Read], and their run_dir."""
    folder = tmp_path_factory.mktemp("a chain")
    for tool, options in (
        ("train_tokenizer", []),
        ("encode_dataset", []),
        ("train_prior", ["trainer.max_steps=4"]),
        ("train_prior", ["trainer.max_steps=6", "resume=true"]),
    ):
        call_tool(tool, folder, *ON, *LAYERS, *CODES, *options)
    options = dict.fromkeys(("pipeline", "data", "weights", "device")) | {"dtype": "float32"}
    options["arguments"] = [str(folder / "tiny.yaml"), "wandb.mode=auto", *CODES, *PROTOCOL]
    runpy.run_path(str(TOOLS / "evaluate.py"))["main"](argparse.Namespace(**options))
    return read_all(folder / "run"), folder / "run"


@pytest.fixture(scope="module")
def groups(tmp_path_factory, logged_out):
    """A prior over pixels with groups of latents, whose previews have several samples."""
    folder = tmp_path_factory.mktemp("groups")
    call_tool("train_prior", folder, *ON, *GROUPS)
    (read,) = read_all(folder / "run")
    return read


def test_runs_are_one_group_by_stage_with_the_settings_that_are_theirs(chain):
    runs, _ = chain
    assert [read.run.job_type for read in runs] == ["tokenizer", "encode", "prior", "prior", "evaluation"]
    names = ["tiny-tokenizer", "tiny-encode", "tiny-prior", "tiny-prior", "tiny-one_digit"]
    assert [read.run.display_name for read in runs] == names
    assert {read.run.project for read in runs} == {"latentcast"} and {read.run.run_group for read in runs} == {"tiny"}
    assert list(runs[0].run.tags) == ["tiny"]
    tokenizer, _, prior, _, evaluation = (read.config for read in runs)
    assert tokenizer["tokenizer"]["n_layers"] == 2 and prior["prior"]["n_blocks"] == 1
    assert not {"prior", "n_context", "joint_training", "cache", "evaluation", "protocol"} & tokenizer.keys()
    assert not {"num_samples", "sampler"} & tokenizer["preview"].keys()
    assert not {"tokenizer", "joint_training", "evaluation", "protocol"} & prior.keys() and prior["n_context"] == 1
    for config in (tokenizer, prior):
        assert config["batch_size"] == 8 and config["parameters"] >= config["trainable_parameters"] > 100
    assert evaluation["protocol"]["n_clips"] == 4 and evaluation["model"]["prior"] == "STPixelCNN"


def test_the_step_of_a_row_is_the_number_of_steps_made_and_resuming_appends(chain):
    runs, folder = chain
    first, second = runs[2:4]
    assert first.run.run_id == second.run.run_id and first.folder != second.folder
    steps = [row["_step"] for read in (first, second) for row in read.rows]
    assert steps == sorted(set(steps)) and steps[-1] == 6
    rows = {row["_step"]: row for read in (first, second) for row in read.rows}
    assert all(row["step"] == step for step, row in rows.items())
    assert [step for step, row in rows.items() if "train/loss" in row] == [1, 2, 3, 4, 5, 6]
    for key, kind, suffix in (("futures_video", "video-file", "mp4"), ("futures", "image-file", "png")):
        media = {step: row for step, row in rows.items() if row.get(f"media/{key}/_type") == kind}
        assert list(media) == [2, 4, 6]
        for step, row in media.items():
            read = first if step <= 4 else second
            logged = (read.folder / "files" / row[f"media/{key}/path"]).read_bytes()
            assert logged == (folder / f"previews/prior/step_{step:07d}.{suffix}").read_bytes()
            assert row[f"media/{key}/caption"] == f"STPixelCNN, step {step}: held-out clips"


def test_every_metric_has_an_axis_and_the_summary_that_it_wants(chain, groups):
    wanted = {"train/loss": "min", "val/loss": "min", "val/psnr": "max", "val/ssim": "max", "train/usage_1": "max"}
    wanted |= {"val/dead_fraction_2": "min", "train/bits_per_code_1": "min", "train/kl_group_1": "", "train/lr": ""}
    wanted |= {"train/mse": "min", "throughput/data_wait": "", "preview/sample_std": "", "train/grad_norm": ""}
    found = {}
    for read in (*chain[0], groups):
        found |= read.metrics
        assert read.keys - {"_step", "_runtime", "_timestamp"} == read.metrics.keys() - {"epoch"} | read.keys & {
            "epoch"
        }
    assert found.pop("step").options.hidden and found.pop("epoch").options.hidden
    assert {metric.step_metric for metric in found.values()} == {"step"}
    for name, best in wanted.items():
        summary = found[name].summary
        assert summary.last and (summary.min, summary.max) == (best == "min", best == "max"), name
    assert {key.partition("/")[0] for key in found} == {
        *("encode", "evaluation", "media", "preview", "throughput", "train", "val")
    }
    assert summary_of("preview/ilpips") == "last" and summary_of("val/lpips") == "min,last"


def test_what_was_made_from_what_is_told_in_artifacts_and_in_a_file(chain):
    runs, folder = chain
    made = {kind: artifact for read in runs for kind, artifact in read.artifacts.items()}
    assert {kind: artifact.name for kind, artifact in made.items()} == {
        kind: f"tiny-{kind}" for kind in ("tokenizer", "latents", "prior", "evaluation")
    }
    files = {kind: {entry.path: entry for entry in artifact.manifest.contents} for kind, artifact in made.items()}
    assert files["tokenizer"].keys() == {path.name for path in (folder / "tokenizer").iterdir()}
    assert files["evaluation"].keys() == {"one_digit.json", "one_digit.md"}
    manifest = files["latents"]["train/manifest.json"]
    assert manifest.ref == (folder / "latents/train/manifest.json").as_uri()  # by reference: nothing is copied
    assert all(entry.ref.startswith("file://") for entry in files["latents"].values())
    cached = [path for path in (folder / "latents").rglob("*") if path.suffix in (".json", ".safetensors")]
    assert files["latents"].keys() == {str(path.relative_to(folder / "latents")) for path in cached}
    about = json.loads(made["latents"].metadata)["splits"]["train"]
    assert about["sha256"] == lineage.file_sha256(folder / "latents/train/manifest.json")
    assert not list(folder.glob("wandb/**/*.safetensors"))

    edges = lineage.read_edges(folder)
    last = {edge["run"]["stage"]: edge["run"]["id"] for edge in edges}
    found = {
        (e["run"]["stage"], e["direction"], e["artifact"]["type"], e["artifact"]["digest"])
        for e in edges
        if e["run"]["id"] == last[e["run"]["stage"]]
    }
    digests = {kind: artifact.digest for kind, artifact in made.items()}
    assert {edge for edge in found if edge[1] == "makes"} == {
        (stage, "makes", kind, digests[kind])
        for stage, kind in (
            ("tokenizer", "tokenizer"),
            ("encode", "latents"),
            ("prior", "prior"),
            ("evaluation", "evaluation"),
        )
    }
    uses = (("encode", "tokenizer"), ("prior", "latents"), ("evaluation", "tokenizer"), ("evaluation", "prior"))
    assert found - {edge for edge in found if edge[1] == "makes"} == {
        (stage, "uses", kind, digests[kind]) for stage, kind in uses
    }
    assert {edge["declared"] for edge in edges if edge["direction"] == "uses"} == {False}  # W&B refuses it offline


def test_an_evaluation_has_a_summary_by_its_protocol_and_its_pictures(chain):
    runs, folder = chain
    (row,) = runs[-1].rows
    results = json.loads((folder / "metrics/one_digit.json").read_text())
    for metric in ("psnr", "ssim", "crps"):
        assert row[f"evaluation/one_digit/{metric}"] == pytest.approx(results["metrics"][metric]["mean"])
    assert "evaluation/one_digit/copy_last_frame/psnr" in row and "evaluation/one_digit/mean_of_samples/psnr" in row
    assert row["media/random_video/_type"] == "video-file" and row["media/best_sheet/_type"] == "image-file"
    assert row["media/best_sheet/caption"] == "run under one_digit"


def test_every_panel_of_the_dashboard_shows_what_is_logged(chain, groups, command):
    keys = groups.keys.union(*(read.keys for read in chain[0]))
    with_weights = {"val/lpips", "preview/ilpips"}  # where those are at hand
    try:
        find_weights("lpips_alex")
    except OSError:
        keys |= with_weights
    status, found, err = command("wandb_dashboard", "--project", "p", "--dry-run")
    assert status == 0, err
    names = ["overview", "quality", "codebooks", "latents", "samples", "throughput", "system"]
    assert [section["name"] for section in found["sections"]] == names
    panels = [panel for section in found["sections"][:-1] for panel in section["panels"]]
    panels += [panel for block in found["report"]["blocks"] for panel in block["panels"]]
    for panel in panels:
        assert set(panel.get("metrics", ())) <= keys, panel
        if "regex" in panel:
            of_results = keys | {f"evaluation/any/{metric}" for metric in METRICS}
            assert any(re.search(panel["regex"], key) for key in of_results), panel
    # The library makes of them what is sent.
    sent = found["specs"]["workspace"]["section"]["panelBankConfig"]["sections"]
    assert [section["name"] for section in sent] == names
    sent = [panel["config"] for section in sent for panel in section["panels"]]
    assert {"chartTitle": "loss", "xAxis": "step", "metrics": ["train/loss", "val/loss"]} in sent
    assert ["media/futures_video"] in [panel.get("mediaKeys") for panel in sent]
    grids = [block for block in found["specs"]["report"]["blocks"] if block["type"] == "panel-grid"]
    filters = [grid["metadata"]["runSets"][0]["filters"]["filters"][0] for grid in grids]
    assert [(f["key"]["name"], f["value"]) for f in filters] == [
        ("jobType", block["job_types"]) for block in found["report"]["blocks"]
    ]
    chart = next(p for p in grids[0]["metadata"]["panelBankSectionConfig"]["panels"] if p["viewType"] == "Bar Chart")
    assert chart["config"]["metrics"] == ["summary_metrics.val/psnr.max"]


def test_the_dashboard_of_some_runs_and_their_lineage(chain, tmp_path, command):
    _, folder = chain
    status, found, _ = command("wandb_dashboard", folder, "--project", "p", "--dry-run", "--lineage", folder)
    assert status == 0
    names = [section["name"] for section in found["sections"]]
    assert "codebooks" in names and "latents" not in names  # which none of them has
    assert [edge["run"]["stage"] for edge in found["lineage"]] == ["encode", "prior", "evaluation", "evaluation"]
    for arguments, message in (
        (["--project", "p"], "nobody is logged in at W&B; run wandb login first, or .* --dry-run"),
        (["--project", "p", "--dry-run", "--lineage", tmp_path], "no lineage.json here; runs that log to W&B write it"),
        (["--project", "p", "--dry-run", tmp_path], "no metrics/\\*.csv here; expected the folder of a run"),
    ):
        status, _, err = command("wandb_dashboard", *arguments)
        assert status == 1 and re.search(message, err.splitlines()[-1]), err


def test_a_dashboard_without_wandb_workspaces_names_the_extra(monkeypatch, command):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "wandb_workspaces" else True)
    status, _, err = command("wandb_dashboard", "--project", "p", "--dry-run")
    assert status == 1 and err == "error: wandb-workspaces is not installed; pip install 'latentcast[wandb]'\n"


def test_a_run_without_wandb_or_disk_warns_once_and_goes_on(tmp_path, monkeypatch, caplog):
    monkeypatch.setitem(sys.modules, "wandb", None)
    run = WandbRun(tmp_path, "prior", SETTINGS, "tiny")
    run.start({"a": 1})
    run.log({"loss": 1.0}, 1)
    run.uses("prior", tmp_path)
    run.close()
    monkeypatch.undo()
    (tmp_path / "wandb").write_text("a file where the folder should be")
    broken = WandbRun(tmp_path, "prior", SETTINGS, "tiny")
    broken.start({})
    broken.log({"loss": 1.0}, 1)
    missing, full = [record.message for record in caplog.records if record.message.startswith("W&B is off")]
    assert missing == "W&B is off: wandb is not installed; pip install 'latentcast[wandb]'"
    assert full.startswith("W&B is off from here on: ")


def test_after_a_stop_figures_are_logged_once_and_late_ones_and_pictures_move_up(tmp_path, caplog):
    caplog.set_level("INFO", "latentcast")
    picture = Path(__file__).parents[1] / "docs/datasets/flow.png"
    run = WandbRun(tmp_path, "prior", SETTINGS, "tiny", resume=True, last_step=4)
    run.start({})
    run.log({"at_3": 3.0}, 3)
    run.log_files({"media/futures_video": picture}, 3, "step 3")  # made again: that of the stopped run may be lost
    for step in (4, 5, 7, 6, 8):
        run.log({f"at_{step}": float(step)}, step)
    run.makes("prior", tmp_path / "nothing")
    run.close()
    (read,) = read_all(tmp_path)
    rows = {row["_step"]: row for row in read.rows}
    assert list(rows) == [5, 7, 8]
    assert rows[7]["at_6"] == 6 and "at_3" not in str(rows) and "at_4" not in str(rows)
    assert rows[5]["media/futures_video/caption"] == "step 3" and rows[5]["at_5"] == 5
    assert "W&B: its steps cannot go back, media/futures_video of step 3 is logged at 5" in caplog.text
    assert "W&B: no artifact of" in caplog.text and "W&B is off" not in caplog.text


def test_being_logged_in_is_seen_without_network(tmp_path, monkeypatch):
    assert not logged_in()
    netrc = tmp_path / "netrc"
    netrc.write_text("machine api.wandb.ai login user password " + "0" * 40)
    netrc.chmod(0o600)
    monkeypatch.setenv("NETRC", str(netrc))
    assert logged_in()
    monkeypatch.setenv("WANDB_BASE_URL", "https://wandb.example.org")
    assert not logged_in()
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    assert logged_in()


def test_online_without_an_account_is_kept_offline(tmp_path, caplog):
    run = WandbRun(tmp_path, "prior", SETTINGS | {"mode": "online"}, "tiny")
    run.start({})
    run.log({"loss": 1.0}, 1)
    run.close()
    assert "nobody is logged in" in caplog.text
    assert len(list((tmp_path / "wandb").glob("offline-run-*"))) == 1
