"""``logger=tensorboard|trackio|none``: what they hold after a run and after a resumed one, by their own readers."""

import importlib.util
import io
import json
import sqlite3
import sys

import pytest
from PIL import Image
from tiny_experiment import call_tool, run_tool

PIXELS = ["tokenizer=pixel", "tokenizer.levels=4", "frame_size=8", "data.digit_size=6", "preview.every_n_steps=2"]


def train(folder, kind, *options):
    return call_tool("train_prior", folder, *PIXELS, f"logger={kind}", *options)


def test_tensorboard_has_curves_settings_and_moving_pictures_and_a_resumed_run_hides_what_it_does_again(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    def read():
        found = EventAccumulator(str(folder), size_guidance={"images": 0})
        found.Reload()
        return found

    folder = tmp_path / "run/tensorboard/prior"
    train(tmp_path, "tensorboard")
    found = read()
    assert [event.step for event in found.Scalars("train/loss")] == [1, 2, 3, 4]
    assert {"val/loss", "train/lr", "throughput/clips_per_s", "preview/sample_std"} <= set(found.Tags()["scalars"])
    for key, kind in (("futures_video", "gif"), ("futures", "png")):
        events = found.Images(f"media/{key}")
        assert [event.step for event in events] == [2, 4]
        assert events[1].encoded_image_string == (tmp_path / f"run/previews/prior/step_0000004.{kind}").read_bytes()
    with Image.open(io.BytesIO(found.Images("media/futures_video")[0].encoded_image_string)) as image:
        assert image.n_frames == 4
    settings = (folder / "hparams.yaml").read_text()
    assert "n_layers: 1" in settings and "parameters:" in settings and "joint_training" not in settings

    train(tmp_path, "tensorboard", "resume=true", "trainer.max_steps=6")
    assert [event.step for event in read().Scalars("train/loss")] == [1, 2, 3, 4, 5, 6]
    train(tmp_path, "tensorboard", "overwrite=true", "trainer.max_steps=2")
    assert [event.step for event in read().Scalars("train/loss")] == [1, 2]
    assert not (tmp_path / "run/wandb").exists()


def test_trackio_has_rows_pictures_and_settings_and_a_resumed_run_goes_on_in_the_same_one(tmp_path, monkeypatch):
    pytest.importorskip("trackio")
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))  # read when trackio is imported
    for name in [name for name in sys.modules if name.partition(".")[0] == "trackio"]:
        monkeypatch.delitem(sys.modules, name)
    train(tmp_path, "trackio", "wandb.project=ours")
    options = ["wandb.project=ours", "resume=true", "trainer.max_steps=6"]
    status, figures, err = run_tool("train_prior", tmp_path, *PIXELS, "logger=trackio", *options)
    assert status == 0 and figures["steps"] == 6, err  # whatever trackio prints, the last line is the tool's
    (path,) = (tmp_path / "trackio").glob("ours*.db")
    with sqlite3.connect(path) as database:
        rows = database.execute("select run_name, run_id, step, metrics from metrics order by id").fetchall()
        ((settings,),) = database.execute("select distinct config from configs").fetchall()
    assert {row[0] for row in rows} == {"tiny-prior"} and len({row[1] for row in rows}) == 1
    parsed = [(step, json.loads(metrics)) for _, _, step, metrics in rows]
    assert [step for step, metrics in parsed if "train/loss" in metrics] == [1, 2, 3, 4, 5, 6]
    media = [(step, metrics["media/futures_video"]) for step, metrics in parsed if "media/futures_video" in metrics]
    assert [step for step, _ in media] == [2, 4, 6]
    for step, medium in media:
        stored = next((tmp_path / "trackio/media").rglob(medium["file_path"].rpartition("/")[2]))
        assert stored.read_bytes() == (tmp_path / f"run/previews/prior/step_{step:07d}.mp4").read_bytes()
        assert medium["caption"] == f"VideoTransformer, step {step}: held-out clips"
    config = json.loads(settings)
    assert config["prior"]["n_layers"] == 1 and config["stage"] == "prior" and "tokenizer" not in config


@pytest.mark.parametrize("kind", ["tensorboard", "trackio"])
def test_a_logger_that_is_not_installed_is_named_with_its_extra_and_the_run_goes_on(
    tmp_path, kind, monkeypatch, caplog
):
    monkeypatch.setitem(sys.modules, kind, None)
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == kind else real(name, *a))
    assert train(tmp_path, kind)["steps"] == 4
    (message,) = [record.message for record in caplog.records if " is off: " in record.message]
    assert message.endswith(f" is off: {kind} is not installed; pip install 'latentcast[{kind}]'")
    assert (tmp_path / "run/metrics/prior.csv").is_file() and (tmp_path / "run/pipeline").is_dir()


def test_none_logs_nowhere_else_and_an_unknown_logger_is_refused_before_anything_is_lost(tmp_path):
    train(tmp_path, "none")
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("*")}
    assert not {"wandb", "tensorboard", "trackio"} & {path.name for path in (tmp_path / "run").iterdir()}
    for tool in ("train_prior", "encode_dataset"):
        with pytest.raises(
            ValueError, match="logger: expected one of wandb, tensorboard, trackio, none, found 'mlflow'"
        ):
            call_tool(tool, tmp_path, *PIXELS, "logger=mlflow", "overwrite=true")
    assert before == {path: path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("*")}
