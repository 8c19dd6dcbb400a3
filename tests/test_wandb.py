"""What a training run leaves in W&B, read back from the files of an offline run."""

import builtins
import json
import struct
import time

import pytest
from tiny_experiment import call_tool
from wandb.proto import wandb_internal_pb2

from latentcast.training.loggers import WandbRun, _logged_in

HEADER, BLOCK = 7, 32768
SETTINGS = {"mode": "offline", "project": "test", "entity": None, "group": None, "tags": []}


@pytest.fixture(autouse=True)
def logged_out(monkeypatch, tmp_path):
    """No account and no network: the tests must not send anything anywhere."""
    for name in ("WANDB_API_KEY", "WANDB_MODE", "WANDB_BASE_URL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "no-netrc"))


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
            parsed = wandb_internal_pb2.Record()
            parsed.ParseFromString(record)
            yield parsed
            record = b""


def read_run(folder):
    """-> (run record, config, list of rows) of one W&B folder."""
    (path,) = folder.glob("*.wandb")
    for _ in range(100):  # wandb's own process writes it, and may still be at it after the run is closed
        records = list(read_records(path))
        if any(record.WhichOneof("record_type") == "exit" for record in records):
            break
        time.sleep(0.1)
    run, config, rows = None, {}, []
    for record in records:
        kind = record.WhichOneof("record_type")
        if kind == "run":
            run = record.run
            updates = record.run.config.update
        elif kind == "config":
            updates = record.config.update
        else:
            updates = []
        for item in updates:
            config[item.key or "/".join(item.nested_key)] = json.loads(item.value_json)
        if kind == "history":
            items = record.history.item
            rows.append({item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in items})
    return run, config, rows  # a picture's entries in a row are called name/_type, name/path and so on


def test_an_offline_run_holds_figures_config_and_pictures_and_resumes_without_going_back(tmp_path):
    call_tool("train_tokenizer", tmp_path)
    call_tool("encode_dataset", tmp_path)
    assert not (tmp_path / "run/wandb").exists()  # the tiny experiment has wandb.mode=disabled
    arguments = ["wandb.mode=auto", "wandb.tags=[tiny]", "preview.every_n_steps=2"]
    call_tool("train_prior", tmp_path, *arguments, "trainer.max_steps=4")
    (first,) = (tmp_path / "run/wandb").glob("offline-run-*")
    call_tool("train_prior", tmp_path, *arguments, "trainer.max_steps=6", "resume=true")
    second = max((tmp_path / "run/wandb").glob("offline-run-*"), key=lambda path: path.stat().st_mtime_ns)
    assert second != first

    runs = [read_run(folder) for folder in (first, second)]
    for run, config, _ in runs:
        assert run.project == "latentcast" and run.run_group == "tiny" and run.job_type == "prior"
        assert run.display_name == "tiny-prior" and list(run.tags) == ["tiny"]
        assert config["batch_size"] == 8 and config["prior"]["n_layers"] == 1
    assert runs[0][0].run_id == runs[1][0].run_id

    steps = [row["_step"] for _, _, rows in runs for row in rows]
    assert steps == sorted(set(steps)) and steps[-1] >= 5
    rows = {row["_step"]: row for _, _, part in runs for row in part}
    assert sorted(step for step, row in rows.items() if "train/loss" in row) == [0, 1, 2, 3, 4, 5]
    for name in ("lr-AdamW", "train/bits_per_code", "throughput/codes_per_s"):
        assert any(name in row for row in rows.values()), name
    assert any("val/loss" in row for row in rows.values())
    videos = {
        step: row["media/futures_video/path"]
        for step, row in rows.items()
        if row.get("media/futures_video/_type") == "video-file"
    }
    assert list(videos) == [1, 3, 5]
    for folder, step in ((first, 1), (second, 5)):
        logged = (folder / "files" / videos[step]).read_bytes()
        assert logged == (tmp_path / f"run/previews/prior/step_{step + 1:07d}.mp4").read_bytes()
    assert any(row.get("media/futures/_type") == "image-file" for row in rows.values())


def test_a_run_without_wandb_or_disk_warns_once_and_goes_on(tmp_path, monkeypatch, caplog):
    real_import = builtins.__import__

    def without_wandb(name, *args, **kwargs):
        if name == "wandb":
            raise ModuleNotFoundError("No module named 'wandb'")
        return real_import(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without_wandb)
    run = WandbRun(tmp_path, "prior", SETTINGS, "tiny")
    run.log_hyperparams({"a": 1})
    run.log_metrics({"loss": 1.0}, 1)
    run.close()
    monkeypatch.undo()
    (tmp_path / "wandb").write_text("a file where the folder should be")
    broken = WandbRun(tmp_path, "prior", SETTINGS, "tiny")
    broken.log_hyperparams({})
    broken.log_metrics({"loss": 1.0}, 1)
    messages = [record.message for record in caplog.records if record.message.startswith("W&B is off")]
    assert len(messages) == 2 and "No module named 'wandb'" in messages[0]


def test_steps_logged_before_a_stop_are_left_out_and_late_ones_move_up(tmp_path):
    run = WandbRun(tmp_path, "prior", SETTINGS, "tiny", resume=True, last_step=4)
    run.log_hyperparams({})
    for step in (3, 4, 5, 7, 6, 8):
        run.log_metrics({f"at_{step}": float(step)}, step)
    run.close()
    (folder,) = (tmp_path / "wandb").glob("offline-run-*")
    rows = {row["_step"]: row for row in read_run(folder)[2]}
    assert list(rows) == [5, 7, 8]
    assert rows[7]["at_6"] == 6 and "at_3" not in str(rows) and "at_4" not in str(rows)


def test_being_logged_in_is_seen_without_network(tmp_path, monkeypatch):
    assert not _logged_in()
    netrc = tmp_path / "netrc"
    netrc.write_text("machine api.wandb.ai login user password " + "0" * 40)
    netrc.chmod(0o600)
    monkeypatch.setenv("NETRC", str(netrc))
    assert _logged_in()
    monkeypatch.setenv("WANDB_BASE_URL", "https://wandb.example.org")
    assert not _logged_in()
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    assert _logged_in()


def test_online_without_an_account_is_kept_offline(tmp_path, caplog):
    run = WandbRun(tmp_path, "prior", SETTINGS | {"mode": "online"}, "tiny")
    run.log_hyperparams({})
    run.log_metrics({"loss": 1.0}, 0)
    run.close()
    assert "nobody is logged in" in caplog.text
    assert len(list((tmp_path / "wandb").glob("offline-run-*"))) == 1
