"""The report: one HTML file with everything in it, which opens without a server and without a network."""

import base64
import logging
import math
from dataclasses import dataclass
from datetime import date

from jinja2 import Environment, PackageLoader, StrictUndefined, select_autoescape

import latentcast
from latentcast.evaluation.comparison import describe_differences, differences, paired
from latentcast.evaluation.markdown import cell, difference
from latentcast.evaluation.results import mean_of_samples, measured
from latentcast.figures.charts import HEADINGS
from latentcast.files import printable, telling_names, write_text
from latentcast.sizes import size_text

logger = logging.getLogger("latentcast")

TYPES = {".png": "image/png", ".mp4": "video/mp4"}


@dataclass(frozen=True)
class Cell:
    """Of a table: ``text``, and whether it is the best of its column."""

    text: str
    best: bool = False


class Budget:
    """Takes files into the page while there is room.

    Attributes:
        left: bytes that may still be added. left_out: paths of the files that did not fit.
    """

    def __init__(self, n_bytes):
        self.left, self.left_out = n_bytes, []

    def take(self, medium):
        """The file as a data URL; None where there is no room, or it cannot be read."""
        path = medium.path
        try:
            size = 4 * math.ceil(path.stat().st_size / 3)
            if size > self.left:
                self.left_out.append(str(path))
                return None
            content = base64.b64encode(path.read_bytes()).decode()
        except OSError as error:
            logger.warning("%s: left out (%s)", path, error.strerror)
            return None
        self.left -= len(content)
        return f"data:{TYPES[path.suffix]};base64,{content}"


def write_page(runs, path, max_bytes=20_000_000):
    """Write the report of runs as one HTML file.

    Args:
        runs: list of RunFolder; several are compared, under every protocol that two of them share.
        path: of the file.
        max_bytes: the page is no larger. What there is no room for (the sections' last files first) is named in it.
    Returns:
        paths of the files that were left out.
    """
    names = _names(runs)
    budget = Budget(max_bytes - 200_000 - sum(len(stage.text) * 2 for run in runs for stage in run.stages))
    page = [_section(name, run) for name, run in zip(names, runs)]
    # Round by round over the sections, so that a first one with many files leaves room for the others.
    shelves = [(section["media"], heading, list(found)) for section in page for heading, found in section["found"]]
    for turn in range(max((len(found) for *_, found in shelves), default=0)):
        for media, heading, found in shelves:
            if turn < len(found) and (url := budget.take(found[turn])):
                media.setdefault(heading, []).append((found[turn], url))
    environment = Environment(
        loader=PackageLoader("latentcast.reporting", "."),
        autoescape=select_autoescape(["j2"], default=True),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    text = environment.get_template("page.html.j2").render(
        title=", ".join(names),
        runs=page,
        comparisons=_comparisons(dict(zip(names, runs))),
        left_out=[printable(name) for name in budget.left_out],
        limit=f"{max_bytes / 1e6:.3g} MB",
        version=latentcast.__version__,
        today=date.today().isoformat(),
    )
    write_text(path, text)
    return budget.left_out


def _names(runs):
    """The folders' names, with as many folders above as tell them apart."""
    names = telling_names([run.path.resolve().parts for run in runs])
    if names is None:
        raise ValueError(f"{runs[0].path}: given twice")
    return [printable(name) for name in names]


def _section(name, run):
    return {
        "name": name,
        "path": printable(str(run.path)),
        "tiles": _tiles(run),
        "stages": [_stage(stage) for stage in run.stages],
        "results": [(protocol, *_table({name: result})) for protocol, (_, result) in run.results.items()],
        "found": list(run.media.items()),
        "media": {},
    }


def _tiles(run):
    """(what, figure, beside it) of what a reader wants to know first."""
    tiles = [
        (stage.name, stage.model, _told(stage.n_parameters, stage.steps))
        for stage in run.stages
        if stage.name != "joint"
    ]
    for protocol, (_, result) in list(run.results.items())[:1]:
        for metric in [m for m in ("psnr", "ssim", "lpips", "fvd", "bits") if m in result["metrics"]][:3]:
            copy = result["baselines"].get("copy_last_frame", {}).get(metric)
            beside = f"copying the last frame: {copy['mean']:.4g}" if copy else protocol
            tiles.append((HEADINGS[metric], f"{result['metrics'][metric]['mean']:.4g}", beside))
    return tiles


def _told(n_parameters, steps):
    size = "" if n_parameters is None else f"{n_parameters / 1e6:.3g}M parameters"
    return ", ".join(filter(None, (size, f"{steps:,} steps" if steps else "")))


def _stage(stage):
    groups = (stage.settings.get(key) for key in ("data", "optimizer"))
    data, optimizer = (group if isinstance(group, dict) else {} for group in groups)
    facts = {
        "model": stage.model,
        "size": _told(stage.n_parameters, stage.steps),
        "data": data.get("root") or data.get("folder") or str(data.get("_target_", "")).rpartition(".")[2],
        "clips a batch": stage.settings.get("batch_size"),
        "learning rate": optimizer.get("lr"),
        "seed": stage.settings.get("seed"),
    }
    facts = {what: printable(str(value)) for what, value in facts.items() if value not in (None, "")}
    figures = [(name, f"{last:.4g}", f"{best:.4g}") for name, (last, best) in stage.figures.items()]
    return {"name": stage.name, "command": stage.command, "facts": facts, "figures": figures, "text": stage.text}


def _table(results):
    """label -> result under one protocol -> what was measured, heads, and rows of the models and of the baselines."""
    first = next(iter(results.values()))
    protocol, data = first["protocol"], first["data"]
    models = {}
    for label, result in results.items():
        models[label] = result["metrics"]
        if means := mean_of_samples(result["metrics"]):
            models[f"{label}, mean of samples"] = means
    metrics = measured([*models.values(), *first["baselines"].values()])
    best = {}
    for metric in metrics:
        values = [result["metrics"][metric]["mean"] for result in results.values() if metric in result["metrics"]]
        if len(set(values)) > 1:
            best[metric] = (max if "↑" in HEADINGS[metric] else min)(values)
    rows = [
        (printable(label), [Cell(cell(found.get(m)), _is(found.get(m), best.get(m))) for m in metrics], False)
        for label, found in models.items()
    ]
    rows += [
        (who.replace("_", " "), [Cell(cell(found.get(m))) for m in metrics], True)
        for who, found in first["baselines"].items()
    ]
    about = (
        f"{protocol['n_context']} context frames, {protocol['n_predicted']} predicted, "
        f"{protocol['n_samples']} samples; {data['n_clips']} clips of {data['name']} "
        f"({first['protocol'].get('split', 'test')}), "
        f"{size_text(protocol['frame_size'])} pixels. Best of the samples where nothing else is said; ± half a 95 % "
        "interval."
    )
    notes = [f"Command: {command}" for result in results.values() if (command := result.get("command"))]
    hardware = first.get("hardware") or {}
    notes += [", ".join(f"{key}: {value}" for key, value in hardware.items())] if isinstance(hardware, dict) else []
    return printable(about), [HEADINGS[m] for m in metrics], rows, [printable(note) for note in notes if note]


def _is(entry, value):
    return entry is not None and value is not None and entry["mean"] == value


def _comparisons(runs):
    """What is compared: protocol, table, and differences from the first run that has it."""
    found = []
    protocols = dict.fromkeys(protocol for run in runs.values() for protocol in run.results)
    for protocol in protocols:
        results = {name: run.results[protocol][1] for name, run in runs.items() if protocol in run.results}
        if len(results) < 2:
            continue
        (first, reference), *others = results.items()
        unlike = {label: differences(reference, result) for label, result in others}
        alike = {first: reference} | {label: result for label, result in others if not unlike[label]}
        notes = [
            f"{label} does not compare with {first}: {describe_differences(differs)}"
            for label, differs in unlike.items()
            if differs
        ]
        pairs = {label: paired(reference, result) for label, result in others}
        metrics = measured(pairs.values())
        rows = [(label, [difference(by.get(m)) for m in metrics]) for label, by in pairs.items() if by]
        about, heads, body, _ = _table(alike)
        found.append(
            {
                "protocol": protocol,
                "about": about,
                "heads": heads,
                "rows": body,
                "notes": [printable(note) for note in notes],
                "first": first,
                "difference_heads": [HEADINGS[m] for m in metrics],
                "differences": rows,
            }
        )
    return found
