"""Recorded environments: real Atari, and a small world whose pictures tell which actions led to them."""

import json
import multiprocessing
import re
import signal
import sys

import numpy as np
import pytest
import torch

gymnasium = pytest.importorskip("gymnasium", reason="the extra latentcast[gym] is not installed")
pytest.importorskip("ale_py", reason="the extra latentcast[gym] is not installed")

from corridor import SIZE, Corridor  # noqa: E402

from latentcast import prepared_videos  # noqa: E402
from latentcast.data.sets.gym import Gym  # noqa: E402
from latentcast.data.store.prepared import IncompleteError, prepare  # noqa: E402

MEANINGS = ["NOOP", "FIRE", "RIGHT", "LEFT", "RIGHTFIRE", "LEFTFIRE"]
CORRIDOR = "corridor:Corridor-v0"


@pytest.fixture
def prepare_dataset(command):
    return lambda *arguments: command("prepare_dataset", "gym", *arguments)


def contents(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*.*") if path.is_file()}


def episode(data, index):
    """(frames as bytes, conditions) of a whole video"""
    n_frames = data.videos[index].n_frames
    frames = ((data.read_video(index, 0, n_frames) + 1) * 127.5).round().to(torch.uint8)
    return frames, data.read_conditions(index, 0, n_frames)


def test_pong_is_recorded_with_what_led_to_each_frame(tmp_path, prepare_dataset):
    """By the tool; playing the stored actions again gives the stored pictures and rewards."""
    options = ["--policy", "random", "--frames", 180, "--output", tmp_path / "pong", "--workers", 0]
    keys = [
        "region=[34,0,160,160]",
        "max_frames=90",
        "frame_skip=6",
        "repeat=4",
        "val_fraction=.25",
        "test_fraction=.25",
    ]
    status, figures, err = prepare_dataset("--env", "ALE/Pong-v5", *options, *keys)
    assert status == 0, err
    assert figures["counts"] == {"train": 1, "val": 1, "test": 1} and figures["frames"] == 180
    manifest = json.loads((tmp_path / "pong/manifest.json").read_text())
    assert manifest["conditions"] == {
        "action": {"shape": [], "dtype": "int64", "per": "frame", "n_values": 6, "names": MEANINGS},
        "reward": {"shape": [], "dtype": "float32", "per": "frame"},
        "end": {"shape": [], "dtype": "int64", "per": "frame", "n_values": 2},
    }
    assert manifest["fps"] == 10 and manifest["provenance"]["action_meanings"][2] == "RIGHT"
    assert manifest["protocol"]["env_options"] == {"frameskip": 1, "repeat_action_probability": 0.0}
    data = prepared_videos(tmp_path / "pong", "train", 4, name="gym", actions=True)
    frames, conditions = episode(data, 0)
    assert frames.shape == (90, 3, 64, 64) and len(conditions["action"].unique()) == 6
    assert (conditions["action"][0], conditions["reward"][0], conditions["end"].sum()) == (0, 0, 0)
    assert conditions["reward"].sum() < 0  # a random player lets balls pass
    env = gymnasium.make("ALE/Pong-v5", render_mode="rgb_array", frameskip=6, repeat_action_probability=0)
    env.reset(seed=1)
    for t in range(1, 90):
        _, reward, *_ = env.step(int(conditions["action"][t]))
        field = torch.from_numpy(env.render()[34:194]).permute(2, 0, 1)[None].float()
        expected = torch.nn.functional.interpolate(field, (64, 64), mode="bilinear", antialias=True)[0]
        assert (frames[t].float() - expected).abs().max() <= 1.5 and reward == conditions["reward"][t]


def test_an_episode_does_not_depend_on_those_before_it():
    """Of a game that is random itself: its sticky actions are seeded, too."""
    options = {"env": "ALE/Pong-v5", "frames": 100, "max_frames": 40, "env_options": {"repeat_action_probability": 0.5}}

    def played(benchmark, name):
        clip = benchmark.read("train", name)
        return torch.cat(list(clip.frames)), clip.conditions["action"]

    one, other = Gym(**options), Gym(**options)
    first, second, again = (played(one, f"episode-00000{i}") for i in (0, 1, 0))
    assert all(torch.equal(a, b) for a, b in zip(second, played(other, "episode-000001")))
    assert all(torch.equal(a, b) for a, b in zip(first, again)) and not torch.equal(first[0], second[0])


def test_episodes_are_added_until_there_are_the_frames_whatever_the_workers(tmp_path):
    options = {"env": CORRIDOR, "frames": 400, "frame_size": SIZE, "frame_skip": 1, "max_frames": 50, "fps": 7}
    figures = prepare(Gym(**options), tmp_path / "one")
    assert 400 <= figures["frames"] < 450 and figures["counts"]["train"] > 10
    prepare(Gym(**options), tmp_path / "two", workers=2)
    assert contents(tmp_path / "one") == contents(tmp_path / "two")
    prepare(Gym(**options | {"seed": 1}), tmp_path / "three")
    one, three = (prepared_videos(tmp_path / name, "train", 2) for name in ("one", "three"))
    assert one.fps == 7 and not torch.equal(episode(one, 0)[1]["action"], episode(three, 0)[1]["action"])
    before = contents(tmp_path / "one")
    prepare(Gym(**options), tmp_path / "one")  # nothing is left to do
    assert contents(tmp_path / "one") == before
    with pytest.raises(ValueError, match=r"made with protocol\.frames 400, asked for 500"):
        prepare(Gym(**options | {"frames": 500}), tmp_path / "one")


@pytest.mark.parametrize("frame_skip, channels", [(1, 3), (3, 1)])
def test_actions_rewards_and_ends_are_those_that_led_to_the_frame(tmp_path, frame_skip, channels):
    """The corridor's picture shows its position: each action moves it by as much as the action says, held or not."""
    options = {"frame_size": SIZE, "frame_skip": frame_skip, "channels": channels, "max_frames": 12}
    prepare(Gym(env=CORRIDOR, frames=200, **options), tmp_path / "set")
    data = prepared_videos(tmp_path / "set", "train", 2)
    ended, moved = 0, 0
    for index, video in enumerate(data.videos):
        frames, told = episode(data, index)
        assert frames.shape[1] == channels
        places = frames[:, 0].flatten(1).argmax(1) % SIZE  # the brightest column
        assert (told["action"][0], told["reward"][0], told["end"][0]) == (0, 0, 0) and places[0] == SIZE // 2
        for t in range(1, video.n_frames):
            step = int(told["action"][t]) - 1  # stored from 0; the corridor's own numbers begin at 4
            expected, n = int(places[t - 1]), 0
            while n < frame_skip and expected not in (0, SIZE - 1):
                expected, n = expected + step, n + 1
            assert places[t] == expected and told["reward"][t] == n * 0.5
            assert told["end"][t] == (expected in (0, SIZE - 1))
            moved += step != 0
        assert told["end"][:-1].sum() == 0 and video.n_frames <= 12
        ended += int(told["end"][-1])
    assert 0 < ended and moved > 50


@pytest.mark.parametrize(
    "kind, spec",
    [
        ("box", {"shape": [2], "dtype": "float32", "per": "frame"}),
        ("multi", {"shape": [2], "dtype": "int64", "per": "frame", "n_values": 3}),
        ("binary", {"shape": [2], "dtype": "int64", "per": "frame", "n_values": 2}),
    ],
)
def test_spaces_of_actions(tmp_path, kind, spec):
    options = {"env_options": {"kind": kind}, "frame_size": 8, "frame_skip": 1, "max_frames": 8}
    benchmark = Gym(env=CORRIDOR, frames=40, **options)
    assert benchmark.conditions["action"] == spec
    prepare(benchmark, tmp_path / "set")
    _, told = episode(prepared_videos(tmp_path / "set", "train", 2), 0)
    assert told["action"].shape[1:] == (2,) and told["action"].dtype == getattr(torch, spec["dtype"])
    assert told["action"][0].tolist() == [0, 0] and len(told["action"].unique()) > 1


POLICY = """
import numpy as np
def right(observation, env, generator):
    assert observation.shape == (1,) and isinstance(generator, np.random.Generator)
    {line}
    return 6
nothing = 3
"""


def policy(folder, line="pass"):
    path = folder / "policy.py"
    path.write_text(POLICY.format(line=line))
    return path


def test_a_policy_of_a_file_chooses(tmp_path):
    file = policy(tmp_path)
    options = {"env": CORRIDOR, "frames": 40, "frame_size": SIZE, "frame_skip": 1, "max_frames": 10}
    benchmark = Gym(policy=f"{file}:right", **options)
    assert benchmark.describe()["policy"] == "policy.py:right" and len(benchmark.provenance["policy_sha256"]) == 64
    prepare(benchmark, tmp_path / "set", workers=1)
    frames, told = episode(prepared_videos(tmp_path / "set", "train", 2), 0)
    assert told["action"].tolist() == [0] + [2] * (len(frames) - 1) and told["end"].tolist()[-1] == 1


def test_a_policy_that_raises_loses_nothing_and_a_rerun_goes_on(tmp_path):
    """Episode 2 of train fails at its third step, and so does every episode with that draw."""
    options = {"env": CORRIDOR, "frames": 100, "frame_size": SIZE, "frame_skip": 1, "max_frames": 8}
    options |= {"val_fraction": 0.0, "test_fraction": 0.0}
    whole = Gym(policy=f"{policy(tmp_path)}:right", **options)
    prepare(whole, tmp_path / "whole")
    marker = tmp_path / "fails"
    marker.touch()
    line = (
        f"import os\n    if os.path.exists({str(marker)!r}) and generator.random() < .04: raise ZeroDivisionError('no')"
    )
    flaky = Gym(policy=f"{policy(tmp_path, line)}:right", **options)
    with pytest.raises(
        IncompleteError, match=r"train episode-\d{6}, step \d+: .*policy.py:right: ZeroDivisionError: no"
    ):
        prepare(flaky, tmp_path / "set")
    note = json.loads((tmp_path / "set/train/shard-00000.json").read_text())
    assert len(note["videos"]) >= 5 and note["skipped"]
    marker.unlink()
    prepare(flaky, tmp_path / "set")
    one, two = (contents(tmp_path / name / "train") for name in ("whole", "set"))
    assert one == two


def test_a_policy_that_exits_ends_its_episode_alone(tmp_path):
    file = policy(tmp_path, "raise SystemExit(3)")
    benchmark = Gym(env=CORRIDOR, policy=f"{file}:right", frames=10)
    with pytest.raises(IncompleteError, match=r"train episode-000000, step 1: .*policy\.py:right: SystemExit: 3"):
        prepare(benchmark, tmp_path / "set")


@pytest.mark.parametrize("n_steps", [2, 11, 29])
def test_a_killed_recording_goes_on(tmp_path, n_steps):
    """Episodes of five frames where one of 2048 was planned for: they are added by ones, twos, fours and eights."""
    options = {"env": CORRIDOR, "frames": 100, "frame_size": SIZE, "frame_skip": 1, "max_frames": 2048}
    whole = prepare(Gym(policy=f"{policy(tmp_path)}:right", **options), tmp_path / "whole")
    assert whole["counts"]["train"] == 18
    steps = tmp_path / "steps"
    line = f"open({str(steps)!r}, 'a').write('.')\n    "
    line += f"import os; os.path.getsize({str(steps)!r}) == {n_steps} and os.kill(os.getpid(), 9)"
    killed = Gym(policy=f"{policy(tmp_path, line)}:right", **options)
    run = multiprocessing.get_context("fork").Process(target=prepare, args=(killed, tmp_path / "set"))
    run.start()
    run.join(60)
    assert run.exitcode == -signal.SIGKILL and not (tmp_path / "set/manifest.json").exists()
    prepare(Gym(policy=f"{policy(tmp_path, line)}:right", **options), tmp_path / "set")
    assert contents(tmp_path / "set/train") == contents(tmp_path / "whole/train")


@pytest.mark.parametrize(
    "returned, found",
    [("7", "7"), ("'up'", "'up'"), ("None", "None"), ("[5, 5]", r"\[5, 5\]"), ("5.5", "5.5"), ("float('nan')", "nan")],
)
def test_an_action_out_of_the_space_is_named(tmp_path, returned, found):
    file = policy(tmp_path, f"return {returned}")
    options = {"frames": 10, "frame_skip": 1, "val_fraction": 0.0, "test_fraction": 0.0}
    with pytest.raises(
        IncompleteError, match=rf"step 1: .*expected an action of Discrete\(3, start=4\), found {found}"
    ):
        prepare(Gym(env=CORRIDOR, policy=f"{file}:right", **options), tmp_path / "set")


def test_what_cannot_be_played_is_one_line(tmp_path, prepare_dataset):
    file = policy(tmp_path)
    broken = tmp_path / "broken.py"
    broken.write_text("import nowhere_to_be_found")
    output = "--output", tmp_path / "set", "--workers", 0
    ten = "--frames", 10
    corridor = "--env", CORRIDOR
    for arguments, message in [
        ((*corridor, *ten, "env_options={kind: 'text'}"), "expected actions of the kind Discrete, .*, found Text"),
        (
            (*corridor, *ten, "env_options={speed: 3}"),
            "cannot be made and drawn with env_options .'speed': 3.*TypeError",
        ),
        ((*corridor, *ten, "env_options={draws: false}"), "expected an RGB picture, .*, found NoneType"),
        (("--env", "corridor:Blind-v0", *ten), "expected the render mode rgb_array, found human"),
        (("--env", "Nowhere-v3", *ten), "--env Nowhere-v3: not installed .*; install its package"),
        (("--env", "ALE/Nowhere-v5", *ten), "--env ALE/Nowhere-v5: not installed"),
        (("--env", "no_such_package:World-v0", *ten), "not installed .*no_such_package"),
        ((*corridor, *ten, "--policy", f"{tmp_path}/none.py:right"), "none.py:right: no such file"),
        (
            (*corridor, *ten, "--policy", f"{file}:left"),
            r"expected a function left\(observation, env, gen.*\), found none",
        ),
        ((*corridor, *ten, "--policy", f"{file}:nothing"), "expected a function nothing"),
        ((*corridor, *ten, "--policy", "greedy"), "--policy greedy: expected random or FILE.py:function"),
        ((*corridor, *ten, "--policy", f"{broken}:f"), "cannot be loaded .ModuleNotFoundError.*nowhere_to_be_found"),
        ((*corridor, *ten, "--policy", f"{file}:right", "repeat=2"), "repeat: .*expected 1"),
        ((*corridor, *ten, "region=[0,0,40,8]"), r"region: expected \[top, left, height, width\] within 9 x 9 pixels"),
        ((*corridor, *ten, "region=center"), "region: expected"),
        ((*corridor, *ten, "frame_skip=0"), "frame_skip: expected a whole number of at least 1, found 0"),
        ((*corridor, "--frames", 2), "frames: expected one at least for each split with a share, found 2"),
        (corridor, "gym: missing argument 'frames'"),
        (ten, "gym: missing argument 'env'"),
        ((*corridor, *ten, "--source", tmp_path), "--source: gym is made without one"),
    ]:
        status, figures, err = prepare_dataset(*arguments, *output)
        assert status == 1 and figures is None
        last = err.strip().splitlines()[-1]
        assert last == err.strip() and last.startswith("error: ") and re.search(message, last), (message, err)
    assert not (tmp_path / "set").exists() or not list((tmp_path / "set").iterdir())


def test_without_gymnasium_the_extra_is_named(tmp_path, prepare_dataset, monkeypatch):
    monkeypatch.setitem(sys.modules, "gymnasium", None)
    status, _, err = prepare_dataset("--env", CORRIDOR, "--frames", 10, "--output", tmp_path / "set")
    assert status == 1 and err.strip().endswith("not installed; pip install 'latentcast[gym]'")


def test_a_shape_of_its_own_keeps_its_proportions(tmp_path):
    """The central square of what is kept is resized."""
    clip = Gym(env=CORRIDOR, frames=10, frame_size=5, region=[1, 1, 5, 7], frame_skip=1).read("train", "episode-000000")
    frame = next(iter(clip.frames))[0]
    env = Corridor()
    env.reset(seed=0)
    assert torch.equal(frame, torch.from_numpy(np.ascontiguousarray(env.render()[1:6, 2:7])).permute(2, 0, 1))
