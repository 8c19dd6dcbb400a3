"""Results of tools/evaluate.py side by side, their paired differences, and published figures beside them."""

from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import Field, model_validator

from latentcast.figures.charts import HEADINGS
from latentcast.files import read_json
from latentcast.metrics.statistics import paired_bootstrap
from latentcast.schemas import Count, Number, Schema, Text, Whole, check, one_line, short
from latentcast.sizes import Size
from latentcast.yaml_text import flattened

from .protocol import METRICS, without_other_splits
from .report import cell, extrapolated_fvd, mean_of_samples, measured

PUBLISHED = Path(__file__).with_name("published.yaml")
CLIP_FIELDS = {  # they choose the frames of a clip that are compared, and what of them
    "split",
    "n_clips",
    "frame_size",
    "n_context",
    "n_predicted",
    "fps_multiplier",
    "rounded",
}
SETTINGS = {  # what changes a metric on the same frames
    "psnr": {"psnr"},
    "ssim": {"ssim"},
    "lpips": {"lpips", "detector.lpips"},
    "ilpips": {"ilpips", "lpips", "detector.lpips"},
    "crps": {"crps"},
}
UNWRITTEN = {"fps_multiplier": 1, "psnr": "frame", "rounded": False}  # what a protocol that does not name it has
Interval = Annotated[list[Number], Field(min_length=2, max_length=2)]
Metric = Literal[METRICS]


class Entry(Schema):
    """What a result says of one metric."""

    mean: Number
    ci95: Interval | None
    clips: list[Whole] | None = None
    videos: list[Whole] | None = None
    per_clip: list[Number] | None = None
    per_frame: list[Number] | None = None
    per_frame_ci95: list[Interval | None] | None = None
    best_of: "dict[Annotated[Text, Field(pattern='^[1-9][0-9]{0,9}$')], Entry] | None" = None
    n_samples: Count | None = None
    debiased: Number | None = None

    @model_validator(mode="after")
    def _are_of_one_length(self):
        for name, of in (("per_clip", "clips"), ("videos", "clips"), ("per_frame_ci95", "per_frame")):
            values, along = getattr(self, name) or [], getattr(self, of) or []
            if len(values) != len(along) and (values or name == "per_clip"):  # a single video has no intervals
                raise ValueError(f"expected {name} and {of} of one length, found {len(values)} and {len(along)}")
        if self.best_of and self.n_samples is None:
            raise ValueError("n_samples: expected beside best_of, found nothing")
        return self


class ResultProtocol(Schema):
    """The fields of a protocol that tables show."""

    name: Text
    n_context: Count
    n_predicted: Count
    n_samples: Count
    frame_size: Size
    fps_multiplier: Count = 1


class ResultData(Schema):
    """The data of a result."""

    name: Text
    protocol: dict[Text, Any] | None
    n_clips: Count
    sha256: Text
    describe: dict[Text, Any]


class ResultDetectors(Schema):
    """The networks behind a result: their fingerprints."""

    fvd: Text | None
    lpips: Text | None


class ResultModel(Schema):
    """The model of a result."""

    name: Text


class Result(Schema):
    """What tools/evaluate.py writes."""

    protocol: ResultProtocol
    data: ResultData
    detector: ResultDetectors
    model: ResultModel
    metrics: Annotated[dict[Text, Entry], Field(min_length=1)]
    baselines: dict[Text, dict[Text, Entry]]


class Stated(Schema, extra="forbid"):
    """What a table or row says of its protocol; null: not stated."""

    n_context: Count | None = None
    n_predicted: Count | None = None
    fps_multiplier: Count | None = None
    n_samples: Count | None = None
    frame_size: Size | None = None
    data_protocol: Text | None = None


STATED = tuple(Stated.model_fields)


class Table(Schema, extra="forbid"):
    """A table of published figures."""

    paper: Text
    place: Text
    data: Text
    preset: Text | None
    selection: Literal["best", "mean"] | None  # of the samples of a clip
    protocol: Stated
    note: Text | None = None
    units: Annotated[dict[Metric, Text], Field(min_length=1)]
    rows: list[dict[Text, Any]]


class Published(Schema):
    """The file PUBLISHED; its head says what is what."""

    papers: dict[Text, Text]
    units: dict[Text, Number | None]
    tables: list[Table]


def read_result(path):
    """What tools/evaluate.py wrote, checked.

    Raises:
        OSError, ValueError: no such file, damaged, or not a result; one line.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    return check(path, Result, read_json(path))


def differences(first, second):
    """All that keeps two results from being compared: field -> (value in the first, value in the second)."""
    sides = [_compared(result) for result in (first, second)]
    fields = dict.fromkeys(field for side in sides for field in side)
    found = {field: tuple(side.get(field) for side in sides) for field in fields}
    found = {field: (one, other) for field, (one, other) in found.items() if one != other}
    if any(field.startswith("data.") and field != "data.clips" for field in found):
        found.pop("data.clips", None)  # it follows from them
    return found


def describe_differences(found):
    """``differences`` as text: "n_context 5 and 2; seed 0 and 1"."""
    return "; ".join(f"{field} {_short(one)} and {_short(other)}" for field, (one, other) in found.items())


def paired(first, second):
    """metric -> ``paired_bootstrap`` of second minus first, of the metrics whose clips and settings are the same.

    FVD has no value for a clip, and so no pairs; nor have clips of one video alone an interval.
    """
    unlike = set(differences(first, second))
    if unlike & CLIP_FIELDS or any(field.startswith("data.") for field in unlike):
        return {}
    found = {}
    for metric, entry in second["metrics"].items():
        base = first["metrics"].get(metric, {})
        same = base.get("clips") and base["clips"] == entry.get("clips")
        if same and not unlike & SETTINGS.get(metric, set()):
            # results from before videos were kept have none
            videos = entry.get("videos") or base.get("videos") or entry["clips"]
            if len(set(videos)) > 1:
                found[metric] = paired_bootstrap(entry["per_clip"], base["per_clip"], videos=videos)
    return found


def read_published(path):
    """The published figures -> list of rows, one a method and table.

    A row has ``method``, ``paper``, ``place`` (the table), ``data``, ``preset`` (a protocol's name or None),
    ``selection`` ("best": of each clip's best sample; "mean": of all, none is chosen; None: not stated, or no
    difference), ``note``, ``protocol`` (STATED -> value; None: not stated; left out: as in UNWRITTEN) and ``metrics``:
    name -> {"printed": str, "unit": str, "value": float in the units of latentcast.metrics, or None where the printed
    unit is not known, "spread": float or None}.

    Raises:
        OSError, ValueError: no such file, or something in it is not as its head says; names table and row.
    """
    try:
        content = check(path, Published, yaml.safe_load(Path(path).read_text()))
    except (yaml.YAMLError, RecursionError) as error:
        raise ValueError(f"{path}: not valid YAML ({' '.join(str(error).split())})") from None
    rows = []
    for table in content["tables"]:
        where = one_line(f"{path}: {table['paper']}, {table['place']}, {table['data']}", 400)
        unknown = [unit for unit in table["units"].values() if unit not in content["units"]]
        unknown += [table["paper"]] * (table["paper"] not in content["papers"])
        if unknown:
            raise ValueError(f"{where}: {unknown[0]!r} is not known")
        for row in table["rows"]:
            stated = {key: value for key, value in row.items() if key not in ("method", *table["units"])}
            printed = {metric: row[metric] for metric in table["units"] if metric in row}
            check(f"{where}: {one_line(row.get('method'))}", Stated, stated)
            if not printed or not isinstance(row.get("method"), str):
                raise ValueError(f"{where}: {short(row)}: expected a method and some of {', '.join(table['units'])}")
            rows.append(
                {
                    "method": row["method"],
                    **{key: table.get(key) for key in ("paper", "place", "data", "preset", "selection", "note")},
                    "protocol": {key: (UNWRITTEN | table["protocol"] | stated).get(key) for key in STATED},
                    "metrics": {
                        metric: _figure(
                            f"{where}: {one_line(row['method'])}: {metric}", text, table["units"][metric], content
                        )
                        for metric, text in printed.items()
                    },
                }
            )
    return rows


def published_beside(rows, result):
    """Rows of the result's data that share a metric with it, each with ``differs``: field -> (theirs, ours).

    Those with the fewest differences come first.
    """
    ours = UNWRITTEN | result["protocol"] | {"data_protocol": (result["data"]["protocol"] or {}).get("protocol")}
    beside, metrics = [], {*measured([result["metrics"], *result["baselines"].values()])}
    for row in rows:
        if row["data"] == result["data"]["name"] and row["metrics"].keys() & metrics:
            sides = {key: (row["protocol"][key], ours[key]) for key in STATED}
            beside.append(row | {"differs": {key: pair for key, pair in sides.items() if pair[0] != pair[1]}})
    return sorted(beside, key=lambda row: len(row["differs"]))


def table(results, unlike):
    """Markdown: a column for each result and the first one's baselines, a row for each metric.

    Args:
        results: label -> result.
        unlike: label -> ``differences`` from the first, of results that do not compare with it.
    """
    first, *_ = results
    marks = {label: f" [{number}]" for number, label in enumerate(unlike, start=1)}
    columns = {label + marks.get(label, ""): result["metrics"] for label, result in results.items()}
    columns |= results[first]["baselines"]
    metrics = measured(columns.values())
    lines = _grid(["", *columns], ([HEADINGS[m], *(cell(found.get(m)) for found in columns.values())] for m in metrics))
    if extrapolated := extrapolated_fvd(columns):
        lines += [extrapolated, ""]
    for label, found in unlike.items():
        lines += [f"{marks[label].strip()} does not compare with {first}: {describe_differences(found)}", ""]
    return "\n".join(lines)


def difference_table(results, found):
    """Markdown of paired differences: label -> metric -> ``paired_bootstrap``."""
    first = next(iter(results))
    metrics = [m for m in METRICS if any(m in by_metric for by_metric in found.values())]
    lines = [f"Differences from {first} over the same clips, 95 % interval and p by paired bootstrap over videos:", ""]
    lines += _grid(
        ["", *found],
        ([HEADINGS[m], *(difference(by_metric.get(m)) for by_metric in found.values())] for m in metrics),
    )
    return "\n".join(lines)


def difference(found):
    """One of ``paired`` as text."""
    if found is None:
        return "–"
    low, high = found["ci95"]
    return f"{found['difference']:+.4g} [{low:.4g}, {high:.4g}], p {found['p_value']:.2g}"


def published_table(results, rows):
    """Markdown of results of one data set and ``published_beside`` the first of them; ``results``: label -> result.

    Of several samples ours are given in the way of the papers: the best where one of them chose it, the mean where one
    chose none. Where rows are of tokenizers alone, so is one of ours: the baseline `reconstruction`.
    """
    first = next(iter(results.values()))
    ours = []  # (label, result, which of the samples, metric -> entry)
    for label, result in results.items():
        means = mean_of_samples(result["metrics"])
        selections = {row["selection"] for row in rows if row["metrics"].keys() & means.keys()}
        if selections != {"mean"}:
            ours.append((label, result, "best" if means else "", result["metrics"]))
        if "mean" in selections:
            ours.append((label, result, "mean", result["metrics"] | means))
        if "reconstruction" in result["baselines"] and any("clip_mse" in row["metrics"] for row in rows):
            ours.append((f"{label}, reconstruction", result, "", result["baselines"]["reconstruction"]))
    metrics = measured(found for *_, found in ours)
    body = [
        [f"**{label}**", *_frames(result["protocol"]), which, *(cell(found.get(m)) for m in metrics), "", ""]
        for label, result, which, found in ours
    ]
    for row in rows:
        body.append([row["method"], *_frames(row["protocol"]), row["selection"] or ""])
        body[-1] += [
            *(_printed(row["metrics"].get(m)) for m in metrics),
            f"{row['paper']}, {row['place']}",
            _notes(row),
        ]
    heads = ["", "frames", "samples", "of them", *(HEADINGS[m] for m in metrics), "source", "protocol differs"]
    intro = (
        f"Published for {first['data']['name']}. Of several samples: best, each clip's best for every metric, or mean, "
        "all of them; empty: not stated, or no difference. The last column compares frames, their rate, samples, size "
        "and split: not the number of clips, the form of PSNR, the window of SSIM, the network of LPIPS, the detector "
        "of FVD."
    )
    return "\n".join([intro, "", *_grid(heads, body)])


def _compared(result):
    """field -> value of all that comparable results share."""
    protocol = UNWRITTEN | {key: value for key, value in result["protocol"].items() if key not in ("name", "source")}
    described = without_other_splits(result["data"]["describe"], protocol.get("split"))
    data = described | {key: result["data"][key] for key in ("name", "n_clips")}
    digest = {"data.clips": result["data"]["sha256"]}  # of the description and which clips
    return protocol | flattened({"detector": result["detector"], "data": data}) | digest


def _figure(where, printed, unit, content):
    """A printed figure, "258.89 +- 2.85" say, with what it is in our units."""
    try:
        value, spread = (*(float(part) for part in printed.split("+-")), None)[:2]
    except (ValueError, AttributeError):
        raise ValueError(f"{where}: expected a figure as printed, in quotes, found {printed!r}") from None
    scale = content["units"][unit]
    known = scale is not None
    return {
        "printed": printed,
        "unit": unit,
        "value": value * scale if known else None,
        "spread": spread * scale if known and spread is not None else None,
    }


def _grid(heads, rows):
    lines = [heads, ["---"] * len(heads), *rows]
    return ["| " + " | ".join(str(text).replace("|", "\\|") for text in line) + " |" for line in lines] + [""]


def _frames(protocol):
    n_context, n_predicted, n_samples = (
        "?" if protocol[key] is None else protocol[key] for key in ("n_context", "n_predicted", "n_samples")
    )
    multiplier = (UNWRITTEN | protocol)["fps_multiplier"]
    rate = "" if multiplier in (1, None) else f" at {multiplier} times the rate"
    return f"{n_context} → {n_predicted}{rate}", n_samples


def _notes(row):
    unstated = [key for key, (theirs, _) in row["differs"].items() if theirs is None]
    notes = [f"{key} {theirs}, here {ours}" for key, (theirs, ours) in row["differs"].items() if theirs is not None]
    notes += [f"not stated: {', '.join(unstated)}"] * bool(unstated) + [row["note"]] * bool(row["note"])
    return "; ".join(notes)


def _printed(figure):
    if figure is None:
        return "–"
    printed, unit = figure["printed"].replace("+-", "±"), figure["unit"]
    if unit == "as ours":
        return printed
    if figure["value"] is None:
        return f"{printed} (unit {unit})"
    if float(figure["printed"].split("+-")[0]) == figure["value"]:
        return f"{printed} {unit}"
    return f"{figure['value']:.4g} (printed {printed}, {unit})"


def _short(value):
    """Long values, checksums mostly, by their beginning."""
    text = str(value)
    return text if len(text) <= 40 else f"{text[:12]}…"
