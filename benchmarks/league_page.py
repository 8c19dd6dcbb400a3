"""The page of the league: tables and pictures of what is finished. See ``league.py``."""

from claims import section

from latentcast.figures.charts import tradeoff
from latentcast.files import read_json, write_text

RESULT, COST = "result.json", "cost.json"  # of a run that is kept
PICTURES = ("best", "random", "worst")  # of evaluate.py
COLUMNS = {  # metric -> (heading, how its figure is found)
    "psnr": ("PSNR (dB), best ↑", ".2f"),
    "ssim": ("SSIM, best ↑", ".3f"),
    "lpips": ("LPIPS, best ↓", ".4f"),
    "crps": ("CRPS (of 255) ↓", ".2f"),
    "ilpips": ("iLPIPS ↑", ".3f"),
    "fvd": ("FVD ↓", ".0f"),
    "bits": ("bits per dimension ↓", ".4f"),
}
COSTS = ("s a future", "calls a frame")
TRADED = ("lpips", "crps", "fvd")  # for time; of LPIPS the mean of the samples


def swept(option, value):
    """The file of a result with another value of an option of the sampler."""
    return f"{option}_{value}.json"


def render(runs, titles, claims, kept, output):
    """Write ``output`` (Markdown, with its pictures) of all runs that are in the folder ``kept``."""
    lines = [f"# {output.stem.capitalize()}", "", "Written by `python benchmarks/league.py --render`.", ""]
    finished = {}
    for table, title in titles.items():
        done = [run for run in runs if run.table == table and (kept / run.name / RESULT).is_file()]
        results = {run.name: (run, *(read_json(kept / run.name / file) for file in (RESULT, COST))) for run in done}
        finished |= {name: result for name, (_, result, _) in results.items()}
        if results:
            lines += [
                f"## {title}",
                "",
                *_table(results),
                *_tradeoff(results, kept, table),
                *_pictures([run for run in done if run.pictures], kept),
            ]
    write_text(output, "\n".join(lines + (section(claims, finished) if claims else [])))


def _table(results):
    first = next(iter(results.values()))[1]
    metrics = [metric for metric in COLUMNS if any(metric in result["metrics"] for _, result, _ in results.values())]
    heads = ["", *_heads(metrics), "parameters", "CPU hours", *COSTS]
    rows = []
    for run, result, state in results.values():
        hours = sum(part.get("cpu_seconds", 0) for part in state.values()) / 3600
        cost = state["cost"]
        rows.append([run.label, *_figures(result["metrics"], metrics), f"{cost['parameters'] / 1e6:.2f}M"])
        rows[-1] += [f"{hours:.2f}", *_costs(cost)]
    for who, found in first["baselines"].items():
        rows.append([who.replace("_", " "), *_figures(found, metrics), "", "", "", ""])
    protocol = first["protocol"]
    counts = f"{first['data']['n_clips']} clips, {protocol['n_samples']} samples each, 95 % intervals."
    return [counts, "", *_grid(heads, rows)]


def _tradeoff(results, kept, table):
    """A table of each run that was evaluated with several values of an option, and quality over time of all runs."""
    lines, sweeps = [], {}
    for name, (run, _, _) in results.items():
        for option, values in run.sweep.items():
            files = {value: kept / name / swept(option, value) for value in values}
            found = {value: read_json(file) for value, file in files.items() if file.is_file()}
            if found:
                metrics = [
                    metric for metric in COLUMNS if all(metric in result["metrics"] for result in found.values())
                ]
                rows = [
                    [f"`{option}={value}`", *_figures(result["metrics"], metrics), *_costs(result["cost"])]
                    for value, result in found.items()
                ]
                lines += [f"### {run.label}: {option}", "", *_grid(["", *_heads(metrics), *COSTS], rows)]
                sweeps[run.label] = [(result["cost"], result["metrics"]) for result in found.values()]
    points = {run.label: [(state["cost"], result["metrics"])] for run, result, state in results.values()} | sweeps
    picture = f"{table}_tradeoff.png"
    drawn = {
        metric: {
            label: [
                (cost["seconds_a_future"], value)
                for cost, found in line
                if (value := _value(found, metric)) is not None
            ]
            for label, line in points.items()
        }
        for metric in TRADED
        if any(metric in found for line in points.values() for _, found in line)
    }
    if not drawn or sum(map(len, points.values())) < 2:
        return lines
    tradeoff(drawn, "seconds a future, on one thread").save(kept / picture)
    return [*lines, f"![quality over time]({kept.name}/{picture})", ""]


def _value(metrics, name):
    entry = metrics.get(name, {})
    return entry.get("mean_of_samples", entry).get("mean")


def _heads(metrics):
    return [*(COLUMNS[metric][0] for metric in metrics), "LPIPS, mean ↓"]


def _costs(cost):
    return [f"{cost['seconds_a_future']:.2f}", f"{cost['calls_a_frame']:g}"]


def _grid(heads, rows):
    return [*("| " + " | ".join(row) + " |" for row in (heads, ["---"] * len(heads), *rows)), ""]


def _figures(metrics, names):
    def cell(entry, form):
        if entry is None:
            return "–"
        low, high = entry.get("ci95") or (None, None)
        spread = "" if low is None else f" ± {(high - low) / 2:{form}}"
        return f"{entry['mean']:{form}}{spread}"

    of_all = metrics.get("lpips", {}).get("mean_of_samples")
    return [*(cell(metrics.get(name), COLUMNS[name][1]) for name in names), cell(of_all, ".4f")]


def _pictures(runs, kept):
    lines = []
    for run in runs:
        lines += [f"### {run.label}", ""]
        found = [kind for kind in PICTURES if (kept / run.name / f"{kind}.png").is_file()]
        lines += [line for kind in found for line in (f"![{kind} clips]({kept.name}/{run.name}/{kind}.png)", "")]
    return lines
