"""Runs of Weights & Biases and of trackio. Nothing here needs Lightning: encoding and evaluations log runs as well."""

import contextlib
import importlib
import logging
import netrc
import os
import re
import secrets
from pathlib import Path
from urllib.parse import urlparse

from latentcast.config import to_container

from . import lineage

logger = logging.getLogger("latentcast")

LOGGERS = ("wandb", "tensorboard", "trackio", "none")
MEDIA = "media"  # the prefix of all pictures and videos
BEST = {  # what a run's summary keeps beside the last value, by the end of a quantity's name
    "min": ("loss", "error", "nll", "mse", "lpips", "bits_per_code", "cross_entropy", "dead_fraction"),
    "max": ("psnr", "ssim", "usage", "perplexity"),
}
EVALUATION = ("evaluation", "protocol")
NOT_OF = {  # settings that a stage does without
    "tokenizer": ("prior", "n_context", "joint", "joint_training", "cache", *EVALUATION),
    "prior": ("tokenizer", "joint_training", *EVALUATION),
    "joint": EVALUATION,
}


def settings_of(config, stage):
    """Of an experiment, a plain dict, the settings that a stage is trained with."""
    found = {name: value for name, value in config.items() if name not in NOT_OF[stage]}
    if stage == "tokenizer" and "preview" in found:
        found["preview"] = {k: v for k, v in found["preview"].items() if k not in ("num_samples", "sampler")}
    return found


def summary_of(key):
    """What a summary keeps of a metric: "min,last", "max,last" or "last"."""
    quantity = re.sub(r"(_group)?_\d+$", "", key.rpartition("/")[2])  # usage_3 is as usage
    for kind, ends in BEST.items():
        if any(quantity == end or quantity.endswith(f"_{end}") for end in ends):
            return f"{kind},last"
    return "last"


class Tracker:
    """One run of a tracking library; this class is that of none, and logs nothing.

    Whatever goes wrong with the library is said once and never stops the program. Its steps never go back: what comes
    late is logged at the newest one. A resumed run continues the same run there, and leaves out the figures of steps
    that were logged before it was stopped; their pictures, made again, are logged at the next step, and the log says
    so.

    Args:
        folder: ``run_dir``.
        stage: "tokenizer", "encode", "prior", "joint" or "evaluation": the type of the run.
        settings: the ``wandb`` section of the config; project and group count for any library.
        experiment: its name; that of the group, unless the settings name one.
        name: what to call the run beside the experiment; null: the stage.
        resume: continue the run that is in ``folder``.
        last_step: the last step that was logged before.
    """

    label = package = None

    def __init__(self, folder, stage, settings, experiment, *, name=None, resume=False, last_step=0):
        self.folder, self.stage, self.settings, self.experiment = Path(folder).resolve(), stage, settings, experiment
        self.name = f"{experiment}-{name or stage}"
        self.resume, self.last_step = resume, last_step if resume else 0
        self._run, self._off, self._newest = None, self.package is None, 0

    def start(self, config):
        """Begin the run; ``config``: what it is made with, a plain dict."""
        self._guard(self._start, config)

    def log(self, figures, step):
        """Log figures, name -> number, of a step: how many have been made."""
        if step > self.last_step:
            self._guard(self._log, figures, step)

    def log_files(self, files, step, caption=""):
        """Log pictures and videos, ``media/NAME`` -> path of a png, gif or mp4 file."""
        self._guard(self._log_files, files, step, caption)

    def uses(self, kind, *paths):
        """Note that the run goes on from a "tokenizer", "latents" or a "prior": the folder, or its files."""

    def makes(self, kind, *paths):
        """Note what the run has made."""

    def close(self, exit_code=0):
        """End the run; its files or its upload are complete afterwards."""
        if self._run is not None:
            self._guard(self._close, exit_code)
            self._run = None

    def _guard(self, function, *args):
        if self._off:
            return
        try:
            function(*args)
        except Exception as error:  # such libraries fail in many ways (network, disk); none may end a training
            self._off = True
            if isinstance(error, ModuleNotFoundError) and error.name == self.package:
                logger.warning("%s is off: %s", self.label, not_installed(self.package))
            else:
                logger.warning("%s is off from here on: %s", self.label, lineage.one_line_of(error))

    def _start(self, config):
        if self._run is None:
            self._open(importlib.import_module(self.package), config)

    def _log(self, values, step):
        if self._run is None:
            self._start({})
        if self._run is not None:
            self._newest = max(self._newest, step)
            self._write(values, self._newest)

    def _log_files(self, files, step, caption):
        at = max(self._newest, step, self.last_step + 1)
        if at > step:
            names = ", ".join(files)
            logger.info("%s: its steps cannot go back, %s of step %d is logged at %d", self.label, names, step, at)
        library = importlib.import_module(self.package)
        self._log({name: self._medium(library, path, caption) for name, path in files.items()}, at)

    def _medium(self, library, path, caption):
        path = Path(path)
        if path.suffix in (".mp4", ".gif"):
            return library.Video(str(path), caption=caption, format=path.suffix[1:])
        return library.Image(str(path), caption=caption)

    def _open(self, library, config):
        raise NotImplementedError

    def _write(self, values, step):
        raise NotImplementedError

    def _close(self, exit_code):
        raise NotImplementedError


class WandbRun(Tracker):
    """A run of Weights & Biases. Its files go to ``folder/wandb``, its id to ``folder/wandb/{stage}.id``.

    Every metric has the axis ``step`` and a summary (``summary_of``). What it uses and makes are artifacts, models as
    files and caches by reference, if the settings say so; ``folder/lineage.json`` holds these edges as well."""

    label, package = "W&B", "wandb"

    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        self._defined, mode = set(), self.settings["mode"]
        if mode not in ("auto", "online", "offline", "disabled"):
            raise ValueError(f"wandb.mode: expected auto, online, offline or disabled, found {mode!r}")
        self._off = mode == "disabled"

    def uses(self, kind, *paths):
        self._link("uses", kind, paths)

    def makes(self, kind, *paths):
        self._link("makes", kind, paths)

    def _open(self, wandb, config):
        mode = self.settings["mode"]
        if mode == "auto":
            mode = os.environ.get("WANDB_MODE") or ("online" if logged_in() else "offline")
        elif mode == "online" and not logged_in():
            logger.warning("W&B: wandb.mode=online, but nobody is logged in (wandb login); the run is kept offline")
            mode = "offline"
        if mode == "disabled":
            self._off = True
            return
        id_file = self.folder / "wandb" / f"{self.stage}.id"
        id_file.parent.mkdir(parents=True, exist_ok=True)
        known = id_file.read_text().strip() if self.resume and id_file.is_file() else None
        arguments = {
            "dir": str(self.folder),
            "id": known or secrets.token_hex(4),
            "resume": "allow",
            "project": self.settings["project"],
            "entity": self.settings["entity"],
            "group": self.settings["group"] or self.experiment,
            "name": self.name,
            "job_type": self.stage,
            "tags": self.settings["tags"],
            "config": config,
            "settings": wandb.Settings(
                console="off", quiet=mode == "offline", silent=mode == "offline", init_timeout=60, finish_timeout=120
            ),
        }
        try:
            self._run = wandb.init(mode=mode, **arguments)
        except Exception as error:  # no network, a wrong key, a project that is not ours
            if mode == "offline":
                raise
            logger.warning("W&B cannot be reached (%s); the run is kept offline", " ".join(str(error).split()))
            self._run = wandb.init(mode="offline", **arguments)
        id_file.write_text(self._run.id)
        for name in ("step", "epoch"):  # axes, no curves
            self._run.define_metric(name, hidden=True)
        self._defined = {"step", "epoch"}

    def _write(self, values, step):
        for key in [key for key in values if key not in self._defined]:
            medium = key.startswith(f"{MEDIA}/")
            self._run.define_metric(key, step_metric="step", summary=None if medium else summary_of(key))
        self._defined |= values.keys()
        # W&B's own step is the same, but syncing may number the rows anew.
        self._run.log({**values, "step": step}, step=step)

    def _close(self, exit_code):
        self._run.finish(exit_code)

    def _link(self, direction, kind, paths):
        if self._off or self._run is None or not self.settings["artifacts"]:
            return
        try:
            lineage.link(self._run, self.folder, self.experiment, self.stage, direction, kind, paths)
        except Exception as error:  # see _guard; figures are still logged
            logger.warning("W&B: no artifact of %s: %s", paths[0], lineage.one_line_of(error))


class TrackioRun(Tracker):
    """A run of trackio, whose functions are those of W&B. It is kept where ``trackio show`` finds it, all projects
    together, or where trackio's environment variables say."""

    label = package = "trackio"

    def _open(self, trackio, config):
        self._library = trackio
        self._run = trackio.init(
            project=self.settings["project"],
            name=self.name,
            group=self.settings["group"] or self.experiment,
            config=config | {"stage": self.stage},
            resume="allow" if self.resume else "never",
            embed=False,
        )

    def _write(self, values, step):
        self._run.log(dict(values), step=step)

    def _close(self, exit_code):
        self._library.finish()  # the run's own method would leave it to be ended, and told of, once more at exit


TRACKERS = {"wandb": WandbRun, "trackio": TrackioRun}


def open_tracker(config, folder, stage, **options):
    """The Tracker of an experiment's ``logger``; it logs nothing where that is none of this kind.

    Args:
        config: an experiment. folder, stage, **options: see Tracker.
    Raises:
        ValueError: an unknown logger, or an unknown mode of W&B.
    """
    kind = "none" if config.logger is None else config.logger
    if kind not in LOGGERS:
        raise ValueError(f"logger: expected one of {', '.join(LOGGERS)}, found {kind!r}")
    return TRACKERS.get(kind, Tracker)(folder, stage, to_container(config.wandb), config.name, **options)


@contextlib.contextmanager
def tracked(config, folder, stage, settings, **options):
    """A run of ``open_tracker`` with these ``settings`` as its config, as long as the block."""
    tracker = open_tracker(config, folder, stage, **options)
    tracker.start(settings)
    try:
        yield tracker
    except BaseException:
        tracker.close(1)
        raise
    tracker.close()


def not_installed(package):
    """What to do about a package that an option needs."""
    extra = package.partition("_")[0]
    return f"{package.replace('_', '-')} is not installed; pip install 'latentcast[{extra}]'"


def logged_in():
    """Is there an API key? Asks neither the user nor the network."""
    if os.environ.get("WANDB_API_KEY"):
        return True
    host = urlparse(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")).hostname
    try:
        return netrc.netrc(os.environ.get("NETRC")).authenticators(host) is not None
    except (OSError, netrc.NetrcParseError):
        return False
