"""Where a training run writes its figures: a CSV file in ``run_dir`` always, and the logger that its config names."""

import csv
import importlib.util
import logging
from pathlib import Path

from PIL import Image
from pytorch_lightning.loggers import Logger, TensorBoardLogger
from pytorch_lightning.utilities import rank_zero_only

from latentcast.figures import training_curves
from latentcast.files import replacing, writing

from .metrics_file import read_metrics
from .trackers import not_installed, open_tracker, settings_of

logger = logging.getLogger("latentcast")


class CSVMetrics(Logger):
    """Appends one row (step, metric, value) a figure, so that a killed run leaves everything it has logged.

    A step is how many have been made, here as in every file's name; Lightning counts from 0 the one that it logs. What
    is found again for a step is no new row: the final validation follows that of the last step, and a run that was
    killed after it makes it again.

    Args:
        path: the file, written by rank 0 only.
    """

    def __init__(self, path):
        super().__init__()
        self.path = Path(path)
        self._latest = {}  # metric -> step and value of its last row

    name, version = "metrics", ""

    @rank_zero_only
    def start(self, step):
        """Keep the rows up to ``step`` (0: none): a resumed run does the later steps again."""
        rows = [row for row in read_metrics(self.path) if row[0] <= step] if step and self.path.is_file() else []
        with replacing(self.path) as temporary, open(temporary, "w", newline="") as file:
            csv.writer(file).writerows([("step", "metric", "value"), *rows])
        self._latest = {name: (step, value) for step, name, value in rows}

    @rank_zero_only
    def log_hyperparams(self, params, *args, **kwargs):
        """The config has its own file."""

    @rank_zero_only
    def log_metrics(self, metrics, step):
        step += 1
        found = {name: (step, value) for name, value in metrics.items() if name != "epoch"}
        with writing(self.path), open(self.path, "a", newline="") as file:
            csv.writer(file).writerows(
                (step, name, metrics[name]) for name in found if self._latest.get(name) != found[name]
            )
        self._latest |= found


@rank_zero_only
def plot_curves(path, image):
    """Draw the curves of a metrics file as a PNG; see ``training_curves``."""
    try:
        drawing = training_curves(read_metrics(path), f"{path.parent.parent.name}: {path.stem}")
    except ValueError:  # nothing was logged yet
        return
    drawing.save(image)


class MediaLogger(Logger):
    """A logger of Lightning's that takes pictures and videos, and counts steps as the files' names do."""

    @rank_zero_only
    def log_files(self, files, step, caption):
        """Log pictures and videos.

        Args:
            files: ``media/NAME`` -> path of a png, gif or mp4 file.
            step: how many have been made.
            caption: one line.
        """
        raise NotImplementedError


class TrackerLogger(MediaLogger):
    """Logs to a ``Tracker``: W&B or trackio.

    Args:
        tracker: where to.
        facts: of the run, that go into its config beside the experiment's settings.
    """

    version = ""

    def __init__(self, tracker, facts):
        super().__init__()
        self.tracker, self.facts = tracker, facts

    @property
    def name(self):
        return self.tracker.package

    @rank_zero_only
    def log_hyperparams(self, params, *args, **kwargs):
        self.tracker.start(settings_of(dict(params), self.tracker.stage) | self.facts)

    @rank_zero_only
    def log_metrics(self, metrics, step):
        self.tracker.log(metrics, step + 1)

    @rank_zero_only
    def log_files(self, files, step, caption):
        self.tracker.log_files(files, step, caption)


class TensorBoard(MediaLogger, TensorBoardLogger):
    """Lightning's own, in ``folder/tensorboard/{stage}``. What an earlier run has logged there after ``start_step`` is
    hidden. A video is shown by the GIF beside it, where there is one: TensorBoard plays no other kind."""

    def __init__(self, folder, stage, facts, start_step=0):
        super().__init__(
            folder, name="tensorboard", version=stage, default_hp_metric=False, purge_step=start_step and start_step + 1
        )
        self.stage, self.facts = stage, facts

    @rank_zero_only
    def log_hyperparams(self, params, *args, **kwargs):
        super().log_hyperparams(settings_of(dict(params), self.stage) | self.facts, *args, **kwargs)

    @rank_zero_only
    def log_metrics(self, metrics, step):
        super().log_metrics(metrics, step + 1)

    @rank_zero_only
    def log_files(self, files, step, caption):
        from tensorboard.compat.proto.summary_pb2 import Summary

        for name, path in files.items():
            path = path.with_suffix(".gif") if path.suffix == ".mp4" else path
            if not path.is_file():
                logger.info("TensorBoard: %s: it takes pictures and GIFs alone, and is not given %s", name, path.name)
                continue
            with Image.open(path) as image:
                width, height = image.size
            encoded = Summary.Image(width=width, height=height, colorspace=3, encoded_image_string=path.read_bytes())
            value = Summary.Value(tag=name, image=encoded)
            self.experiment.file_writer.add_summary(Summary(value=[value]), step)


def open_logger(config, stage, folder, facts, *, resume=False, start_step=0, last_step=0):
    """The logger that an experiment names, for Lightning; None for none, and for one that is not installed.

    Args:
        config: an experiment. stage, folder: of the training, see Tracker.
        facts: go into the run's config beside the experiment's settings.
        resume: continue the run that is there.
        start_step: the step that it goes on from. last_step: the last one that was logged before.
    Raises:
        ValueError: see ``open_tracker``.
    """
    tracker = open_tracker(config, folder, stage, resume=resume, last_step=last_step)
    if tracker.package is not None:
        return TrackerLogger(tracker, facts)
    if config.logger != "tensorboard":
        return None
    if importlib.util.find_spec("tensorboard") is None:
        logger.warning("TensorBoard is off: %s", not_installed("tensorboard"))
        return None
    return TensorBoard(folder, stage, facts, start_step)
