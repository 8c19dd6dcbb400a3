"""Where a training run writes its figures: a CSV file in ``run_dir`` always, Weights & Biases where it works."""

import csv
import logging
import netrc
import os
import secrets
from pathlib import Path
from urllib.parse import urlparse

from pytorch_lightning.loggers import Logger
from pytorch_lightning.utilities import rank_zero_only

from latentcast.figures import training_curves
from latentcast.files import replacing, writing

logger = logging.getLogger("latentcast")


class CSVMetrics(Logger):
    """Appends one row (step, metric, value) a figure, so that a killed run leaves everything it has logged.

    Args:
        path: the file, written by rank 0 only.
    """

    def __init__(self, path):
        super().__init__()
        self.path = Path(path)

    name, version = "metrics", ""

    @rank_zero_only
    def start(self, step):
        """Keep the rows up to ``step`` (-1: none): a resumed run does the later steps again."""
        rows = [row for row in read_metrics(self.path) if row[0] <= step] if self.path.is_file() else []
        with replacing(self.path) as temporary, open(temporary, "w", newline="") as file:
            csv.writer(file).writerows([("step", "metric", "value"), *rows])

    @rank_zero_only
    def log_hyperparams(self, params, *args, **kwargs):
        """The config has its own file."""

    @rank_zero_only
    def log_metrics(self, metrics, step):
        with writing(self.path), open(self.path, "a", newline="") as file:
            csv.writer(file).writerows((step, name, value) for name, value in metrics.items() if name != "epoch")


def read_metrics(path):
    """The rows of a metrics file -> list of (step, metric, value); a row cut short by a kill is left out."""
    rows = []
    with open(path, newline="") as file:
        for row in list(csv.reader(file))[1:]:
            try:
                step, name, value = row
                rows.append((int(step), name, float(value)))
            except ValueError:
                continue
    return rows


@rank_zero_only
def plot_curves(path, image):
    """Draw the curves of a metrics file as a PNG; see ``training_curves``."""
    try:
        drawing = training_curves(read_metrics(path), f"{path.parent.parent.name}: {path.stem}")
    except ValueError:  # nothing was logged yet
        return
    drawing.save(image)


class WandbRun(Logger):
    """One Weights & Biases run. Whatever goes wrong with W&B is said once and never stops the training.

    The step of a W&B row is the trainer's step, so it never goes backwards; a resumed run continues the same W&B run
    and leaves out the steps that were logged before it was stopped.

    Args:
        folder: ``run_dir``; W&B's files go to ``folder/wandb``, the id of the run to ``folder/wandb/{stage}.id``.
        stage: "tokenizer", "prior" or "joint": separate runs of one group.
        settings: the ``wandb`` section of the config (mode, project, entity, group, tags).
        name: of the experiment; the group, unless the settings name one.
        resume: continue the run whose id is in ``folder``.
        last_step: the last step that was logged before.
    """

    def __init__(self, folder, stage, settings, name, resume=False, last_step=-1):
        super().__init__()
        self.folder, self.stage, self.settings, self._experiment_name = Path(folder), stage, settings, name
        self.resume, self.last_step = resume, last_step if resume else -1
        self._config, self._run, self._off = {}, None, settings["mode"] == "disabled"
        self._newest = 0
        if settings["mode"] not in ("auto", "online", "offline", "disabled"):
            raise ValueError(f"wandb.mode: expected auto, online, offline or disabled, found {settings['mode']!r}")

    name, version = "wandb", ""

    @rank_zero_only
    def log_hyperparams(self, params, *args, **kwargs):
        self._config = dict(params)
        self._guard(self._start)

    @rank_zero_only
    def log_metrics(self, metrics, step):
        if step > self.last_step:
            self._guard(self._log, metrics, step)

    @rank_zero_only
    def log_files(self, files, step):
        """Log pictures and videos: name -> path of a png, gif or mp4 file."""
        if step > self.last_step:
            self._guard(self._log_files, files, step)

    @rank_zero_only
    def close(self):
        """End the run; W&B has its own files or its upload complete afterwards."""
        self._guard(self._close)

    def _guard(self, function, *args):
        if self._off:
            return
        try:
            function(*args)
        except Exception as error:  # W&B fails in many ways (not installed, network, disk); none may end a training
            self._off = True
            logger.warning("W&B is off from here on: %s: %s", type(error).__name__, " ".join(str(error).split()))

    def _start(self):
        if self._run is not None:
            return
        import wandb

        mode = self.settings["mode"]
        if mode == "auto":
            mode = os.environ.get("WANDB_MODE") or ("online" if _logged_in() else "offline")
        elif mode == "online" and not _logged_in():
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
            "group": self.settings["group"] or self._experiment_name,
            "name": f"{self._experiment_name}-{self.stage}",
            "job_type": self.stage,
            "tags": self.settings["tags"],
            "config": self._config,
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

    def _log(self, metrics, step):
        self._start()
        self._newest = max(self._newest, step)
        self._run.log(dict(metrics), step=self._newest)

    def _log_files(self, files, step):
        import wandb

        media = {
            name: wandb.Video(str(path), format="mp4") if path.suffix == ".mp4" else wandb.Image(str(path))
            for name, path in files.items()
        }
        self._log(media, step)

    def _close(self):
        if self._run is not None:
            self._run.finish()
            self._run = None


def _logged_in():
    """Is there an API key? Asks neither the user nor the network."""
    if os.environ.get("WANDB_API_KEY"):
        return True
    host = urlparse(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")).hostname
    try:
        return netrc.netrc(os.environ.get("NETRC")).authenticators(host) is not None
    except (OSError, netrc.NetrcParseError):
        return False
