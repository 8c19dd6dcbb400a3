"""Episodes of any Gymnasium environment, recorded with actions, rewards and ends."""

import contextlib
import functools
import hashlib
import importlib.metadata
import importlib.util
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from latentcast.config import check_counts, is_whole, one_line

from ...files import file_sha256, read_json
from ...sizes import as_size
from ...urls import Place, Url
from ..base import SPLITS, Clip, unusual_fit
from ..video.folder import check_options, check_rate, luma
from ..video.reader import VideoError, check_crop, fit_pieces
from .base import Benchmark

EXTRA = "pip install 'latentcast[gym]'"
RANDOM = "random"
SHARD_FRAMES = 4096  # of the longest episodes; more of shorter ones
# Of Atari games unless asked for: what is held is then the frame skip's to say, and every action is carried out.
ATARI, ATARI_RATE = {"frameskip": 1, "repeat_action_probability": 0.0}, 60
RATE = 30  # ticks a second of environments that name none


class Gym(Benchmark):
    """Videos of an environment (Gymnasium's API, ``render_mode="rgb_array"``), one an episode.

    Conditions, each of every frame: ``action``, the one that led to the frame, as the environment's space has it
    (Discrete, MultiDiscrete and MultiBinary: int64, counted from 0; Box: float32); ``reward``, what the steps that led
    to it gave together, float32; ``end``, int64, 1 where the episode ended there, by its rules or its time limit, and 0
    where it goes on or is merely cut. Of an episode's first frame all three are 0.

    Each episode has seeds of its own, so the set does not depend on the number of processes and a killed recording goes
    on. Its length shows when it is played: episodes are added until a split has its share of ``frames``, so the last
    one may go past it.

    Args:
        source: nothing is read; None.
        protocol: "standard".
        env: id of the environment: "ALE/Pong-v5"; of a package that registers when it is imported: "package:Name-v0".
        frames: to be recorded, of all splits.
        policy: "random", or "FILE.py:function": ``function(observation, env, generator) -> action``, asked once a
            frame, with a numpy Generator of the episode. An episode is played again where it was not finished, so a
            policy must not depend on earlier ones.
        repeat: the random policy holds each action for 1 to ``repeat`` frames. Where single random moves lead nowhere
            (the paddle of Pong) 4 to 8 show more.
        frame_size: H = W of the frames in pixels, or [H, W].
        crop: how the picture gets to that, bilinear with antialiasing, see ``video.reader.fit_frames``.
        channels: 3 (RGB) or 1 (grey, BT.601 luma).
        region: [top, left, height, width] of the pixels of the rendered picture that are kept; None: all.
        frame_skip: steps of the environment a frame, in which the action is held.
        max_frames: of a video; longer episodes are cut.
        env_options: further arguments of the environment. Atari games get ``frameskip=1`` and
            ``repeat_action_probability=0`` unless they are given here.
        fps: of the videos, for players; None: what the environment says of its steps, over ``frame_skip``.
        val_fraction, test_fraction: share of the frames in these splits.
        seed: of all episodes.
    Raises:
        ValueError: an option outside its range, an environment that is not installed, does not draw or has actions of
            another kind, a policy without its function.
        FileNotFoundError: no such policy file.
    """

    name = "gym"
    needs_source = False
    growing = True

    def __init__(
        self,
        source: Place | None = None,
        protocol: str | None = None,
        *,
        env: str,
        frames: int | Sequence[int] | dict | str,
        policy: str = RANDOM,
        repeat: int = 1,
        frame_size: int | Sequence[int] = 64,
        channels: int = 3,
        crop: str = "center",
        region: str | Sequence[int] | None = None,
        frame_skip: int = 4,
        max_frames: int = 500,
        env_options: str | dict | None = None,
        fps: float | None = None,
        val_fraction: float = 0.05,
        test_fraction: float = 0.05,
        seed: int = 0,
    ) -> None:
        super().__init__(source, protocol)
        check_counts(frames=frames, repeat=repeat, frame_skip=frame_skip, max_frames=max_frames)
        check_options(channels, 1, None, val_fraction, test_fraction)
        check_counts(0, seed=seed)
        self.frames, self.val_fraction, self.test_fraction = frames, val_fraction, test_fraction
        if sum(self._n_frames.values()) > frames:
            raise ValueError(f"frames: expected one at least for each split with a share, found {frames}")
        if not isinstance(env_options or {}, dict):
            raise ValueError(f"env_options: expected {{name: value}}, found {one_line(env_options)}")
        self.env, self.policy, self.repeat = str(env), str(policy), repeat
        self.frame_size, self.crop = as_size(frame_size), check_crop(crop)
        self.channels, self.frame_skip, self.max_frames = channels, frame_skip, max_frames
        self.seed = seed
        self.shard_videos = max(1, SHARD_FRAMES // max_frames)
        if self.policy != RANDOM:
            if repeat != 1:
                raise ValueError(f"repeat: the random policy's; expected 1 beside {self.policy}, found {repeat}")
            file, _, self._function = self.policy.rpartition(":")
            self._file = Path(file).expanduser().absolute()
            self._chosen_by_file  # noqa: B018  # loads it
        spec, package = self._spec()
        self.env_options = (ATARI if package == "ale_py" else {}) | (env_options or {})
        self.region = None
        self.region = _check_region(region, *self._look())
        rate = self._playing.metadata.get("render_fps") or RATE
        if package == "ale_py" and is_whole(self.env_options["frameskip"], 1):
            rate = ATARI_RATE / self.env_options["frameskip"]
        check_rate(fps=1 if fps is None else fps)
        self.fps = float(rate / frame_skip if fps is None else fps)
        self.conditions = {
            "action": _action_spec(self.env, self._playing),
            "reward": {"shape": [], "dtype": "float32", "per": "frame"},
            "end": {"shape": [], "dtype": "int64", "per": "frame", "n_values": 2},
        }
        self.provenance = self._provenance(spec, package)

    def videos(self) -> dict[str, list[str]]:
        return {split: self._names(0, -(-n // self.max_frames)) for split, n in self._n_frames.items()}

    def more(self, split: str, n_videos: int, n_frames: int) -> list[str]:
        left = self._n_frames[split] - n_frames
        if left <= 0:
            return []
        # As many as are missing by their mean length, at most twice what there is: the first ones say little.
        return self._names(n_videos, min(-(-left * n_videos // n_frames), n_videos))

    def read(self, split: str, name: str) -> Clip:
        conditions = {}
        frames = fit_pieces(self._play(split, name, conditions), self.frame_size, crop=self.crop)
        if self.channels == 1:
            frames = (luma(piece).round().to(torch.uint8) for piece in frames)
        return Clip(frames, conditions)

    def describe(self) -> dict:
        policy = self.policy if self.policy == RANDOM else f"{self._file.name}:{self._function}"
        return {
            "protocol": self.protocol,
            "env": self.env,
            "env_options": self.env_options,
            "policy": policy,
            "repeat": self.repeat,
            "frames": self.frames,
            "frame_size": self.frame_size,
            "channels": self.channels,
            "region": self.region,
            "frame_skip": self.frame_skip,
            "max_frames": self.max_frames,
            "val_fraction": self.val_fraction,
            "test_fraction": self.test_fraction,
            "seed": self.seed,
            "resample": "bilinear",
        } | unusual_fit(self)

    def figures(self, root: Path | Url) -> dict:
        notes = [note for split in SPLITS if (root / split).is_dir() for note in _notes(root / split)]
        return {"frames": sum(facts["n_frames"] for note in notes for facts in note["videos"].values())}

    def __getstate__(self):
        own = ("_playing", "_chosen_by_file")  # of each process
        return {name: value for name, value in self.__dict__.items() if name not in own}

    # ------------------------------------------------------------------------------------------------------ episodes

    @property
    def _n_frames(self):
        """split -> its share of the frames, one at least where it has any."""
        shares = {"val": self.val_fraction, "test": self.test_fraction}
        counts = {split: max(1, round(self.frames * share)) if share else 0 for split, share in shares.items()}
        some = 1 if self.val_fraction + self.test_fraction < 1 else 0
        return {"train": max(some, self.frames - sum(counts.values()))} | counts

    @staticmethod
    def _names(first, n):
        return [f"episode-{i:06d}" for i in range(first, first + n)]

    def _longest(self, split, index):
        """Frames at which an episode is cut: the last of those that would do if all were long ends with the share."""
        last, rest = divmod(self._n_frames[split], self.max_frames)
        return rest if rest and index == last else self.max_frames

    def _seed(self, split, index):
        """Of one episode, another one for each of all splits."""
        start = int.from_bytes(hashlib.sha256(f"gym {self.seed}".encode()).digest()[:8], "big")
        return (start + len(SPLITS) * index + SPLITS.index(split)) % 2**31

    def _play(self, split, name, conditions):
        """Play an episode -> iterator of its pictures, (H, W, 3) uint8; ``conditions`` are filled when it has ended."""
        index = int(name.rpartition("-")[2])
        seed, step, last = self._seed(split, index), 0, self._longest(split, index) - 1
        generator = np.random.default_rng([seed, 1])
        env, space = self._playing, self._playing.action_space
        told = {"action": [_zero(space)], "reward": [0.0], "end": [0]}
        what = self.env
        try:
            space.seed(seed)
            observation, _ = env.reset(seed=seed)
            choose = self._random() if self.policy == RANDOM else self._chosen_by_file
            yield self._picture(env)
            while step < last and not told["end"][-1]:
                step += 1
                what = self.policy
                action = _checked(choose(observation, env, generator), space)
                what = self.env
                reward, end = 0.0, False
                for _ in range(self.frame_skip):
                    observation, gained, terminated, truncated, _ = env.step(action)
                    reward, end = reward + float(gained), bool(terminated or truncated)
                    if end:
                        break
                told["action"].append(_counted(action, space))
                told["reward"].append(reward)
                told["end"].append(int(end))
                yield self._picture(env)
        except (Exception, SystemExit) as error:
            self.__dict__.pop("_playing", None)  # whatever state it is in
            raise VideoError(f"{split} {name}, step {step}: {what}: {_one_line(error)}") from error
        for condition, values in told.items():
            dtype = torch.int64 if self.conditions[condition]["dtype"] == "int64" else torch.float32
            conditions[condition] = torch.from_numpy(np.asarray(values)).to(dtype)

    def _random(self):
        """The random policy, for one episode."""
        action, left = None, 0

        def choose(observation, env, generator):
            nonlocal action, left
            if left == 0:
                action = env.action_space.sample()
                left = 1 if self.repeat == 1 else int(generator.integers(1, self.repeat + 1))
            left -= 1
            return action

        return choose

    def _picture(self, env):
        picture = env.render()
        found = getattr(picture, "shape", None), getattr(picture, "dtype", None)
        if found[1] != np.uint8 or len(found[0]) != 3 or found[0][2] != 3:
            raise ValueError(f"render: expected an RGB picture, (H, W, 3) uint8, found {_told(picture)}")
        top, left, height, width = self.region or (0, 0, *found[0][:2])
        return picture[top : top + height, left : left + width]

    # ---------------------------------------------------------------------------------------- environment and policy

    def _spec(self):
        """What the environment is registered with, and the name of the package that has it."""
        try:
            import gymnasium
        except ImportError:
            raise ValueError(f"{self.name}: needs gymnasium, which is not installed; {EXTRA}") from None
        _register_atari(gymnasium)
        module, _, name = self.env.rpartition(":")
        try:
            if module:
                importlib.import_module(module)
            spec = gymnasium.spec(name)
        except (gymnasium.error.Error, ImportError, ValueError) as error:
            atari = name.startswith("ALE/") and "ale_py" not in sys.modules
            advice = EXTRA if atari else "install its package; one that registers when it is imported is PACKAGE:NAME"
            raise ValueError(f"--env {self.env}: not installed ({_one_line(error)}); {advice}") from None
        entry = spec.entry_point
        module = entry if isinstance(entry, str) else getattr(entry, "__module__", "")
        return spec, module.partition(":")[0].partition(".")[0]

    @functools.cached_property
    def _playing(self):
        """The environment, of this process."""
        import gymnasium

        _register_atari(gymnasium)
        return gymnasium.make(self.env, render_mode="rgb_array", disable_env_checker=True, **self.env_options)

    def _look(self):
        """Make the environment and draw it once -> (H, W)"""
        try:
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", ".*render_mode")  # of what is an error here
                self._playing  # noqa: B018
            modes = self._playing.metadata.get("render_modes") or []
            if "rgb_array" not in modes:
                raise ValueError(f"expected the render mode rgb_array, found {', '.join(map(str, modes)) or 'none'}")
            self._playing.reset(seed=0)
            return self._picture(self._playing).shape[:2]
        except Exception as error:
            options = f" with env_options {self.env_options}" if self.env_options else ""
            raise ValueError(f"--env {self.env}: cannot be made and drawn{options} ({_one_line(error)})") from error

    @functools.cached_property
    def _chosen_by_file(self):
        """The policy's function."""
        where = f"--policy {self.policy}"
        if not self._function.isidentifier() or self._file.suffix != ".py":
            raise ValueError(f"{where}: expected {RANDOM} or FILE.py:function")
        if not self._file.is_file():
            raise FileNotFoundError(f"{where}: no such file")
        if str(self._file.parent) not in sys.path:
            sys.path.append(str(self._file.parent))  # what lies beside a script can be imported
        name = f"policy_{hashlib.sha256(bytes(self._file)).hexdigest()[:12]}"
        spec = importlib.util.spec_from_file_location(name, self._file)
        module = sys.modules[name] = importlib.util.module_from_spec(spec)
        try:
            spec.loader.exec_module(module)
        except (Exception, SystemExit) as error:
            raise ValueError(f"{where}: cannot be loaded ({_one_line(error)})") from error
        function = getattr(module, self._function, None)
        if not callable(function):
            raise ValueError(f"{where}: expected a function {self._function}(observation, env, generator), found none")
        return function

    def _provenance(self, spec, package):
        """Versions of what played, what actions mean where the environment tells, and the policy's checksum."""
        versions = {}
        for name in dict.fromkeys(["gymnasium", package]):
            with contextlib.suppress(importlib.metadata.PackageNotFoundError, ValueError):
                versions[name] = importlib.metadata.version(name)
        facts = {"env": spec.id, "versions": versions, "action_space": str(self._playing.action_space)}
        if hasattr(self._playing.unwrapped, "get_action_meanings"):
            facts["action_meanings"] = [str(name) for name in self._playing.unwrapped.get_action_meanings()]
        if self.policy != RANDOM:
            facts["policy_sha256"] = file_sha256(self._file)
        return facts


def _register_atari(gymnasium):
    try:
        import ale_py
    except ImportError:
        return
    ale_py.ALEInterface.setLoggerMode(ale_py.LoggerMode.Error)  # else each process says its name
    gymnasium.register_envs(ale_py)


def _notes(folder):
    """Of the shards of a split."""
    return read_json(folder / "manifest.json", 512)["shards"]


def _check_region(region, height, width):
    """``region`` itself, as a list: a part of a picture."""
    if region is None:
        return None
    fits = isinstance(region, list | tuple) and len(region) == 4 and all(is_whole(n, 0) for n in region)
    if not fits or not 0 < region[2] <= height - region[0] or not 0 < region[3] <= width - region[1]:
        raise ValueError(
            f"region: expected [top, left, height, width] within {height} x {width} pixels (H x W), "
            f"found {one_line(region)}"
        )
    return list(region)


def _one_line(error):
    kind = "" if type(error) is ValueError else f"{type(error).__name__}: "
    return kind + " ".join(str(error).split()).rstrip(".")


def _told(value):
    found = type(value).__name__
    return f"{found} {tuple(value.shape)} {value.dtype}" if isinstance(value, np.ndarray) else found


def _kind(space):
    return type(space).__name__


def _action_spec(env, playing):
    """The condition ``action`` of an environment; Atari games name their actions."""
    space = playing.action_space
    kind = _kind(space)
    if kind == "Box":
        return {"shape": list(space.shape), "dtype": "float32", "per": "frame"}
    n_values = {
        "Discrete": lambda: space.n,
        "MultiDiscrete": lambda: space.nvec.max(),
        "MultiBinary": lambda: 2,
    }.get(kind)
    if n_values is None:
        raise ValueError(
            f"--env {env}: expected actions of the kind Discrete, MultiDiscrete, MultiBinary or Box, found {space}"
        )
    spec = {"shape": list(space.shape), "dtype": "int64", "per": "frame", "n_values": int(n_values())}
    name_actions = getattr(playing.unwrapped, "get_action_meanings", None)
    return spec | {"names": list(name_actions())} if name_actions else spec


def _zero(space):
    return np.zeros(space.shape, np.float32 if _kind(space) == "Box" else np.int64)


def _checked(action, space):
    """An action as its space has it; ValueError for one that is not in it."""
    try:
        found = np.asarray(action)
        whole = _kind(space) == "Box" or (found == np.floor(found)).all()
        with np.errstate(invalid="ignore"):
            found = found.astype(np.int64 if _kind(space) == "Discrete" else space.dtype)
        fits = whole and found.shape == tuple(space.shape)
        found = int(found) if fits and _kind(space) == "Discrete" else found
        fits = fits and space.contains(found)
    except (TypeError, ValueError):
        fits = False
    if not fits:
        raise ValueError(f"expected an action of {space}, found {one_line(action)}")
    return found


def _counted(action, space):
    """An action as it is stored: whole numbers count from 0."""
    return np.asarray(action) - getattr(space, "start", 0)
