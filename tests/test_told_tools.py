"""Actions from a recorded environment to what is predicted with them, by the tools."""

import json
from pathlib import Path

import numpy as np
import pytest
import yaml
from tiny_experiment import EXPERIMENT
from video_files import counter_frames, encode

from latentcast import VideoPredictionPipeline

pytest.importorskip("gymnasium", reason="the extra latentcast[gym] is not installed")
from corridor import Corridor  # noqa: F401  (registers it)

from latentcast.data.sets.gym import Gym
from latentcast.data.store.prepared import prepare

ACTION = {"shape": [], "dtype": "int64", "per": "frame", "n_values": 3}
REWARD = {"shape": [], "dtype": "float32", "per": "frame"}
PROTOCOL = ["protocol=pong_small", "protocol.frame_size=16", "protocol.n_clips=4", "protocol.n_context=2"]
PROTOCOL += ["protocol.n_predicted=2", "protocol.n_samples=2", "protocol.metrics=[psnr]"]


@pytest.fixture
def experiment(tmp_path):
    """An experiment over a recorded world, told of its actions."""
    options = {"env": "corridor:Corridor-v0", "frames": 400, "frame_size": 16, "frame_skip": 1, "channels": 1}
    prepare(Gym(**options, val_fraction=0.2, test_fraction=0.2), tmp_path / "world")
    defaults = {"tokenizer": "vqvae", "data": "gym", "trainer": "default"}
    data = {"root": str(tmp_path / "world"), "actions": True}
    given = {"defaults": defaults, "data": data, "n_context": 2, "run_dir": str(tmp_path / "run")}
    given |= {"optimizer": {"lr": 0.01}}
    path = tmp_path / "steered.yaml"
    path.write_text(yaml.safe_dump(EXPERIMENT | given))
    return path


def run(command, *arguments):
    status, figures, err = command(*arguments)
    assert status == 0, err
    return figures


def test_actions_reach_training_evaluation_and_samples(experiment, tmp_path, command):
    for tool in ("train_tokenizer", "encode_dataset", "train_prior"):
        run(command, tool, experiment, "conditions=[reward]")
    pipeline = ["--pipeline", tmp_path / "run/pipeline"]
    prior = VideoPredictionPipeline.from_pretrained(pipeline[1]).prior
    assert {name: dict(spec) for name, spec in prior.conditions.items()} == {"action": ACTION, "reward": REWARD}
    measured = prior.conditioner.networks[1]  # half a point a step: brought to unit variance by what training showed
    assert 0.3 < measured.mean.item() < 0.5 and 0 < measured.spread.item() < 0.5

    found = {}
    for told in ("own", "shuffled", "none"):
        keys = [*PROTOCOL, f"data.root={tmp_path / 'world'}", f"run_dir={tmp_path / told}"]
        figures = run(command, "evaluate", *pipeline, "--data", "gym", *keys, f"evaluation.conditions={told}")
        results = json.loads(Path(figures["files"]["figures"]).read_text())
        assert results["settings"].get("conditions", "own") == told
        found[told] = results["metrics"]["psnr"]["mean"]
    assert len(set(found.values())) == 3, found
    keys = [
        *PROTOCOL,
        "protocol.data=null",
        f"run_dir={tmp_path / 'digits'}",
        "data.n_heldout_videos=8",
        "data.digit_size=12",
    ]
    status, _, err = command("evaluate", *pipeline, "--data", "moving_digits", *keys)
    assert status == 1 and "conditions: VideoTransformer needs action" in err.splitlines()[-1], err

    encode(tmp_path / "walk.mp4", counter_frames(10), fps=20)
    sample = ["sample", *pipeline, "--input", tmp_path / "walk.mp4", "--n-frames", 3, "--output", tmp_path / "samples"]
    told = {"action": np.full(5, 2), "reward": np.full(5, 0.5, np.float32)}
    np.savez(tmp_path / "right.npz", **told)
    assert len(run(command, *sample, "--conditions", tmp_path / "right.npz")["outputs"]) == 3
    np.savez(tmp_path / "long.npz", **told | {"action": np.full(9, 2)})
    np.savez(tmp_path / "other.npz", state=np.zeros(5))
    (tmp_path / "text.npz").write_text("left")
    for name, message in (
        ("long.npz", "conditions: action: expected (1, 5) (5 frames), found (1, 9)"),
        ("other.npz", "expected the arrays action, reward, found state"),
        ("text.npz", "expected an npz file of numbers"),
        ("none.npz", "expected an npz file of numbers"),
    ):
        status, _, err = command(*sample, "--conditions", tmp_path / name)
        assert status == 1 and message in err.splitlines()[-1], err


def test_a_condition_that_the_data_do_not_have_is_named(experiment, command):
    run(command, "train_tokenizer", experiment)
    for tool in ("encode_dataset", "train_prior"):
        status, _, err = command(tool, experiment, "conditions=[label]")
        found = err.splitlines()[-1]
        assert status == 1 and "expected some that the data set has, action, reward, end, found 'label'" in found, err
