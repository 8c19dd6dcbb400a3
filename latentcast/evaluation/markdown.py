"""Results side by side as Markdown: their figures, their paired differences, and published figures beside them."""

from latentcast.figures.charts import HEADINGS

from .comparison import describe_differences
from .results import UNWRITTEN, mean_of_samples, measured


def table(results: dict[str, dict], unlike: dict[str, dict]) -> str:
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


def difference_table(results: dict[str, dict], found: dict[str, dict]) -> str:
    """Markdown of paired differences: label -> metric -> ``paired_bootstrap``."""
    first = next(iter(results))
    intro = f"Differences from {first} over the same clips, 95 % interval and p by paired bootstrap over videos:"
    rows = ([HEADINGS[m], *(difference(by.get(m)) for by in found.values())] for m in measured(found.values()))
    return "\n".join([intro, "", *_grid(["", *found], rows)])


def difference(found: dict) -> str:
    """One of ``paired`` as text."""
    if found is None:
        return "–"
    low, high = found["ci95"]
    return f"{found['difference']:+.4g} [{low:.4g}, {high:.4g}], p {found['p_value']:.2g}"


def published_table(results: dict[str, dict], rows: list[dict]) -> str:
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
        figures, source = (_printed(row["metrics"].get(m)) for m in metrics), f"{row['paper']}, {row['place']}"
        about = [row["method"], *_frames(row["protocol"]), row["selection"] or ""]
        body.append([*about, *figures, source, _notes(row)])
    heads = ["", "frames", "samples", "of them", *(HEADINGS[m] for m in metrics), "source", "protocol differs"]
    intro = (
        f"Published for {first['data']['name']}. Of several samples: best, each clip's best for every metric, or mean, "
        "all of them; empty: not stated, or no difference. The last column compares frames, their rate, samples, size "
        "and split: not the number of clips, the form of PSNR, the window of SSIM, the network of LPIPS, the detector "
        "of FVD."
    )
    return "\n".join([intro, "", *_grid(heads, body)])


def extrapolated_fvd(named: dict[str, dict]) -> str:
    """A line with the FVDs of infinitely many videos, empty if there are none; ``named``: label -> metric -> entry."""
    fvds = {label: found.get("fvd", {}).get("debiased") for label, found in named.items()}
    values = ", ".join(f"{label} {fvd:.4g}" for label, fvd in fvds.items() if fvd is not None)
    return f"fvd, extrapolated to infinitely many videos: {values}." if values else ""


def cell(entry: dict | None) -> str:
    """A mean and its interval, to four significant digits."""
    if entry is None:
        return "–"
    interval = entry["ci95"]
    return f"{entry['mean']:.4g}" + (f" ± {(interval[1] - interval[0]) / 2:.2g}" if interval else "")


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
