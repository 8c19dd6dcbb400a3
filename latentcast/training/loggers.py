"""Where a training run writes its figures: a CSV file in ``run_dir`` always, and the logger that its config names."""

import csv
import importlib.util
import logging
import math
from collections import defaultdict
from pathlib import Path

from PIL import Image
from pytorch_lightning.loggers import Logger, TensorBoardLogger
from pytorch_lightning.utilities import rank_zero_only

from latentcast.files import printable, replacing, writing

from .trackers import not_installed, open_tracker, settings_of

logger = logging.getLogger("latentcast")


class CSVMetrics(Logger):
    """Appends one row (step, metric, value) a figure, so that a killed run leaves everything it has logged.

    A step is how many have been made, here as in every file's name; Lightning counts from 0 the one that it logs.

    Args:
        path: the file, written by rank 0 only.
    """

    def __init__(self, path):
        super().__init__()
        self.path = Path(path)

    name, version = "metrics", ""

    @rank_zero_only
    def start(self, step):
        """Keep the rows up to ``step`` (0: none): a resumed run does the later steps again."""
        rows = [row for row in read_metrics(self.path) if row[0] <= step] if step and self.path.is_file() else []
        with replacing(self.path) as temporary, open(temporary, "w", newline="") as file:
            csv.writer(file).writerows([("step", "metric", "value"), *rows])

    @rank_zero_only
    def log_hyperparams(self, params, *args, **kwargs):
        """The config has its own file."""

    @rank_zero_only
    def log_metrics(self, metrics, step):
        with writing(self.path), open(self.path, "a", newline="") as file:
            csv.writer(file).writerows((step + 1, name, value) for name, value in metrics.items() if name != "epoch")


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


UNITS = {  # of what models log, by the end of its name
    "bits_per_code": "bits a code",
    "kl": "nats",
    "psnr": "dB",
    "ssim": "1: equal",
    "lpips": "0: equal",
    "perplexity": "codes in use",
}
WIDE = 30  # the largest value over the smallest from which a scale is logarithmic
PANEL, TITLE = (5, 3.5), 0.4  # inches: a panel with all around it; the title above them all
AROUND = {"left": 1.2, "right": 0.15, "bottom": 0.6, "top": 0.4}  # inches that a panel's labels take at most


@rank_zero_only
def plot_curves(path, image):
    """Draw the curves of a metrics file as a PNG: one panel a quantity, training and validation together, and the
    learning rate. What spans orders of magnitude is drawn on a logarithmic scale."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    curves = defaultdict(lambda: defaultdict(list))
    for step, name, value in read_metrics(path):
        split, _, quantity = name.partition("/")
        if split in ("train", "val") and math.isfinite(value):
            curves[quantity][split].append((step, value))
    # What the model reports, its loss first; not the gradient norm, nor figures of single codebooks.
    quantities = sorted(q for q in curves if q not in ("loss", "lr", "grad_norm") and not q[-1].isdigit())
    quantities = [q for q in ("loss", *quantities, "lr") if q in curves]
    if quantities in ([], ["lr"]):
        return
    columns = min(3, len(quantities))
    rows = math.ceil(len(quantities) / columns)
    # All places are given: measuring the texts to lay them out takes longer than a short training.
    width, height = PANEL[0] * columns, PANEL[1] * rows + TITLE
    figure = Figure(figsize=(width, height))
    inner = PANEL[0] - AROUND["left"] - AROUND["right"], PANEL[1] - AROUND["bottom"] - AROUND["top"]
    for index, quantity in enumerate(quantities):
        unit = next((unit for end, unit in UNITS.items() if quantity == end or quantity.endswith(f"_{end}")), None)
        row, column = divmod(index, columns)
        left, bottom = column * PANEL[0] + AROUND["left"], (rows - row - 1) * PANEL[1] + AROUND["bottom"]
        box = (left / width, bottom / height, inner[0] / width, inner[1] / height)
        axes = figure.add_axes(box, xlabel="step", ylabel=unit)
        axes.set_title("learning rate" if quantity == "lr" else quantity.replace("_", " "), y=1)
        axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
        axes.xaxis.set_label_coords(0.5, (0.15 - AROUND["bottom"]) / inner[1])
        axes.yaxis.set_label_coords((0.2 - AROUND["left"]) / inner[0], 0.5)
        for split, points in sorted(curves[quantity].items()):
            axes.plot(*zip(*points), label=split, marker="." if len(points) < 30 else None)
        values = [value for points in curves[quantity].values() for _, value in points]
        if quantity != "learning rate" and min(values) > 0 and max(values) > WIDE * min(values):
            axes.set_yscale("log")
        axes.legend()
    name = printable(f"{path.parent.parent.name}: {path.stem}")  # any folder's
    figure.suptitle(name, y=1 - TITLE / 2 / height, va="center", parse_math=False)
    with replacing(image) as temporary:
        figure.savefig(temporary, format="png", dpi=100)


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
