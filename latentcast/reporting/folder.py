"""What lies in a run's folder, read without loading a model."""

import logging
import math
from dataclasses import dataclass, field
from pathlib import Path

from safetensors import SafetensorError, safe_open

from latentcast.command import typed
from latentcast.evaluation.results import read_result
from latentcast.files import link_outside, told
from latentcast.saved import INDEX, STAGES
from latentcast.schemas import one_line
from latentcast.training.metrics_file import read_metrics
from latentcast.training.trackers import summary_of
from latentcast.yaml_text import read_yaml

logger = logging.getLogger("latentcast")

COMMANDS = ("# python tools/", "# latentcast ")  # how a config of a run that knows its command begins
PLOTS = ("code_frequencies", "latents", "usage", "losses", "kl_groups", "curves", "drift", "ablation")  # figures' names


@dataclass(frozen=True)
class Medium:
    """A picture or video.

    Attributes:
        path: of the file. title: what it shows.
    """

    path: Path
    title: str

    @property
    def is_video(self):
        return self.path.suffix == ".mp4"

    @property
    def is_plot(self):
        """Whether it is lines on white alone, which can be shown on black."""
        return not self.is_video and any(name in self.path.stem for name in PLOTS)


@dataclass
class Stage:
    """A training.

    Attributes:
        name: of STAGES. model: name of its class. settings: its config, a dict. text: the same as YAML.
        command: what repeats it.
        n_parameters: of the saved weights; None before there are any.
        steps: that were logged.
        figures: of validation: name -> (last value, best value).
    """

    name: str
    model: str
    settings: dict
    text: str
    command: str
    n_parameters: int | None = None
    steps: int = 0
    figures: dict = field(default_factory=dict)


@dataclass
class RunFolder:
    """A run.

    Attributes:
        path: of the folder. stages: list of Stage, in order.
        results: protocol -> (path, what tools/evaluate.py wrote).
        media: heading -> list of Medium.
    """

    path: Path
    stages: list
    results: dict
    media: dict

    @property
    def name(self):
        return self.path.resolve().name


def read_run(path):
    """Read a run's folder; what is damaged in it is named and left out.

    Raises:
        FileNotFoundError: no such folder.
        ValueError: nothing in it that a run writes.
    """
    path = Path(path)
    if not path.is_dir():
        raise FileNotFoundError(f"{path}: no such folder")
    stages = [stage for name in STAGES if (stage := _unless_damaged(_read_stage, path, name))]
    results = {}
    for file in sorted((path / "metrics").glob("*.json")):
        if (path / "metrics" / file.stem).is_dir() or (path / "metrics" / f"{file.stem}.md").is_file():
            if found := _unless_damaged(read_result, file):
                results[file.stem] = (file, found)
    media = _media(path, results)
    if not (stages or results or media):
        hint = "; that is a pipeline: give the run's folder" if (path / INDEX).is_file() else ""
        raise ValueError(f"{path}: expected a run's folder (config_STAGE.yaml, metrics, previews), found none{hint}")
    return RunFolder(path, stages, results, media)


def _unless_damaged(read, *args):
    try:
        return read(*args)
    except (OSError, ValueError) as error:
        logger.warning("left out: %s", told(error, args[0]))
        return None


def _read_stage(path, name):
    file = path / f"config_{name}.yaml"
    if not file.is_file():
        return None
    if link := link_outside(file, path):  # what the page shows of a stranger's run is the run's
        raise ValueError(link)
    settings, text = read_yaml(file), file.read_text()
    chosen = settings.get("tokenizer" if name == "tokenizer" else "prior")
    target = chosen.get("_target_") if isinstance(chosen, dict) else None
    first = text.partition("\n")[0]
    command = first.removeprefix("# ") if first.startswith(COMMANDS) else _command(name, file)
    stage = Stage(name, str(target or "?").rpartition(".")[2], settings, text, command)
    parts = ("tokenizer", "prior") if name == "joint" else ("",)
    weights = [found for part in parts for found in sorted((path / name / part).glob("*.safetensors"))]
    if weights:
        stage.n_parameters = sum(map(_count, weights))
    curves = path / "metrics" / f"{name}.csv"
    if curves.is_file():
        stage.steps, stage.figures = _figures(read_metrics(curves))
    return stage


def _command(name, file):
    tool = "train_tokenizer" if name == "tokenizer" else "train_prior"
    return f"{typed(tool)} {file} run_dir=AGAIN" + " joint=true" * (name == "joint")


def _count(weights):
    """Numbers in a file of weights, by its header."""
    try:
        with safe_open(weights, framework="np") as file:
            return sum(math.prod(file.get_slice(name).get_shape()) for name in file.keys())
    except SafetensorError as error:
        raise OSError(f"{weights}: cannot be read ({one_line(error, 200)})") from None


def _figures(rows):
    """Rows of a metrics file -> steps, and of what validation measured: name -> (last, best).

    The best is the largest of what W&B's summaries keep the largest of (``summary_of``), and the smallest of all else.
    """
    values = {}
    for _, metric, value in rows:
        stage, _, name = metric.partition("/")
        if stage == "val" and math.isfinite(value):
            values.setdefault(name, []).append(value)
    best = {name: (max if summary_of(name).startswith("max") else min)(found) for name, found in values.items()}
    return max((step for step, *_ in rows), default=0), {name: (values[name][-1], best[name]) for name in values}


def _media(path, results):
    """heading -> list of Medium, the most telling first."""
    media = {
        "Sampled videos": _files(path / "samples", "*.mp4"),
        "Figures": _files(path / "figures", "*.mp4", "*.png"),
        "Previews of training": [
            Medium(file.path, f"{folder.name}, {file.title}")
            for folder in sorted((path / "previews").glob("*/"))
            for file in _latest(folder)
        ],
        "Curves": _files(path / "metrics", "*_curves.png"),
    }
    for name in results:
        folder, kinds = path / "metrics" / name, ("best", "random", "worst")
        shown = [Medium(folder / f"{kind}.mp4", f"{kind} clips, in motion") for kind in kinds]
        shown += [Medium(folder / f"{kind}.png", f"{kind} clips") for kind in kinds]
        media[f"Evaluation: {name}"] = [found for found in shown if found.path.is_file()] + _files(folder, "*_*.png")
    for heading, found in media.items():
        links = {medium.path: link for medium in found if (link := link_outside(medium.path, path))}
        for link in links.values():
            logger.warning("left out: %s", link)
        media[heading] = [medium for medium in found if medium.path not in links]
    return {heading: found for heading, found in media.items() if found}


def _files(folder, *patterns):
    return [Medium(file, _title(file.stem)) for pattern in patterns for file in sorted(folder.glob(pattern))]


def _latest(folder):
    """The pictures and videos of the last step that previews were made at."""
    found = _files(folder, "step_*.mp4", "step_*.png")
    steps = {medium.path.stem.split("_")[1] for medium in found}
    return [medium for medium in found if medium.path.stem.split("_")[1] == max(steps)]


def _title(stem):
    """A file's name in words: "step_0000500_code_maps" is "step 500: code maps"."""
    kind, number, *rest = [*stem.split("_", 2), "", ""][:3]
    if kind == "step" and number.isdecimal():
        return f"step {int(number):,}" + f": {rest[0].replace('_', ' ')}" * bool(rest[0])
    return stem.replace("_", " ")
