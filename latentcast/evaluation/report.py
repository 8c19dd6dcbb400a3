"""What an evaluation leaves: figures as JSON, a table, plots, and sheets and videos of the best and worst clips."""

import random

import torch

from latentcast.data.pictures import contact_sheet, side_by_side
from latentcast.data.video_writer import write_image, write_video
from latentcast.files import replacing, write_json

from . import plots

N_SHOWN = 4  # clips on a sheet
N_COLUMNS = 10  # frames of each on a picture


def write_report(evaluation, results, folder):
    """Write ``folder/NAME.json``, ``NAME.md`` and the folder ``NAME/`` of pictures; -> name -> path.

    Args:
        evaluation: a finished Evaluation, its parts still there.
        results: what ``Evaluation.finish`` returned, with whatever else belongs into the JSON file.
    """
    name = evaluation.protocol.name
    files = {"figures": folder / f"{name}.json", "table": folder / f"{name}.md"}
    pictures = folder / name
    pictures.mkdir(parents=True, exist_ok=True)
    predictors = {evaluation.label: results["metrics"]} | results["baselines"]
    for metric in results["metrics"]:
        named = {label: found[metric] for label, found in predictors.items() if metric in found}
        if any(entry.get("per_frame") for entry in named.values()):
            files[f"curves_{metric}"] = pictures / f"curves_{metric}.png"
            plots.curves(files[f"curves_{metric}"], named, metric)
        if results["metrics"][metric].get("best_of"):
            files[f"ablation_{metric}"] = pictures / f"ablation_{metric}.png"
            plots.ablation(files[f"ablation_{metric}"], {evaluation.label: results["metrics"][metric]}, metric)
    if "crps" in results["metrics"]:
        named = {label: found["crps"] for label, found in predictors.items()}
        files["curves_inverse_crps"] = pictures / "curves_inverse_crps.png"
        plots.curves(files["curves_inverse_crps"], named, "crps", inverse=True)
        for who, maps in evaluation.crps_maps().items():
            files[f"crps_map_{who}"] = pictures / f"crps_map_{who}.png"
            plots.crps_map(files[f"crps_map_{who}"], maps.mean(0))
    for kind, clips in shown_clips(evaluation).items():
        files |= write_sheet(evaluation, pictures / kind, clips, "random" if kind == "random" else "best")
    with replacing(files["table"]) as temporary:
        temporary.write_text(table(evaluation, results))
    write_json(files["figures"], results)  # last: with it the evaluation is finished
    return {key: str(path) for key, path in files.items()}


def shown_clips(evaluation):
    """ "best", "worst" and "random" -> clips, by the mean squared error of a clip's best sample."""
    errors = evaluation.clip_errors()
    ordered = sorted(errors, key=errors.get)
    drawn = random.Random(evaluation.protocol.seed).sample(sorted(errors), min(N_SHOWN, len(errors)))
    return {"best": ordered[:N_SHOWN], "worst": ordered[::-1][:N_SHOWN], "random": drawn}


def write_sheet(evaluation, stem, clips, sample):
    """``stem``.png: a row of truth above one of prediction for each clip; ``stem``.mp4: truths above predictions."""
    rows, truths, predictions = [], [], []
    for clip in clips:
        context, future, samples = evaluation.shown(clip)
        pair = [torch.cat([context, frames]) for frames in (future, samples[sample])]
        places = torch.linspace(0, len(pair[0]) - 1, min(N_COLUMNS, len(pair[0]))).round().long()
        rows += [frames[places] for frames in pair]
        truths.append(pair[0])
        predictions.append(pair[1])
    files = {f"{stem.name}_sheet": stem.with_suffix(".png"), f"{stem.name}_video": stem.with_suffix(".mp4")}
    write_image(files[f"{stem.name}_sheet"], contact_sheet(torch.stack(rows)))
    video = torch.cat([side_by_side(truths, scale=2), side_by_side(predictions, scale=2)], -2)
    write_video(files[f"{stem.name}_video"], video, evaluation.dataset.fps)
    return files


def table(evaluation, results):
    """The figures as Markdown."""
    protocol, data, model = results["protocol"], results["data"], results["model"]
    metrics = list(results["metrics"])
    heads = [plots.HEADINGS[name] for name in metrics]
    multiplier = protocol["fps_multiplier"]
    n_videos = len(set(evaluation.video_of.values()))
    rate = f" at {multiplier} times the context's frame rate" if multiplier > 1 else ""
    lines = [
        f"# {model['name']} under the protocol {protocol['name']}",
        "",
        f"{protocol['n_context']} context frames, {protocol['n_predicted']} predicted{rate}, "
        f"{protocol['n_samples']} samples; {data['n_clips']} clips of {data['name']} ({data['split']}), "
        f"{protocol['frame_size']} pixels. "
        "psnr, ssim, lpips and mse: the best sample of each clip by its mean over frames, "
        "for each metric by itself. Intervals: 95 % of the mean over clips, by Student's t over the "
        f"{n_videos} videos that they come from.",
        "",
        "| | " + " | ".join(heads) + " |",
        "|---|" + "---|" * len(metrics),
    ]
    for label, found in ({model["name"]: results["metrics"]} | results["baselines"]).items():
        lines.append(f"| {label} | " + " | ".join(cell(found.get(metric)) for metric in metrics) + " |")
    if "fvd" in results["metrics"]:
        fvd = results["metrics"]["fvd"]
        lines += [
            "",
            f"fvd: {fvd['n_real']} real against {fvd['n_fake']} generated videos, detector "
            f"{results['detector']['fvd'][:12]}.",
        ]
    if extrapolated := extrapolated_fvd({model["name"]: results["metrics"]} | results["baselines"]):
        lines += ["", extrapolated]
    return "\n".join(lines) + "\n"


def extrapolated_fvd(named):
    """A line with the FVDs of infinitely many videos, empty if there are none; ``named``: label -> metric -> entry."""
    fvds = {label: found.get("fvd", {}).get("debiased") for label, found in named.items()}
    values = ", ".join(f"{label} {fvd:.4g}" for label, fvd in fvds.items() if fvd is not None)
    return f"fvd, extrapolated to infinitely many videos: {values}." if values else ""


def cell(entry):
    """A mean and its interval, to four significant digits."""
    if entry is None:
        return "–"
    interval = entry["ci95"]
    return f"{entry['mean']:.4g}" + (f" ± {(interval[1] - interval[0]) / 2:.2g}" if interval else "")
