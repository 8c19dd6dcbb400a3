"""What an evaluation leaves: figures as JSON, a table, plots, and sheets and videos of the best and worst clips."""

import random
from collections.abc import Iterable, Sequence
from pathlib import Path

from jaxtyping import Float
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from latentcast.data.video.writer import write_image, write_video
from latentcast.figures import ablation, crps_maps, curves
from latentcast.figures.charts import HEADINGS
from latentcast.figures.sheets import LEGEND, frame_names, labelled_sheet, labelled_videos, picked, rows_of, scale_for
from latentcast.files import replacing, write_json, write_text
from latentcast.schemas import one_line
from latentcast.sizes import size_text

from .evaluator import Evaluation
from .markdown import cell, extrapolated_fvd
from .results import mean_of_samples, measured

N_SHOWN = 4  # clips on a sheet
N_COLUMNS = 10  # frames of each on a picture
MAPS = "crps_maps.safetensors"


def write_report(evaluation: Evaluation, results: dict, folder: str | Path) -> dict[str, str]:
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
    files |= write_curves(results["metrics"], predictors, {evaluation.label: results["metrics"]}, pictures)
    if "crps" in results["metrics"]:
        files |= {"crps_maps": pictures / "crps_maps.png", "crps_maps_values": pictures / MAPS}
        maps, title = evaluation.crps_maps(), maps_title(results)
        with replacing(files["crps_maps_values"]) as temporary:
            save_file(maps, temporary, metadata={"title": title})
        named = {evaluation.label if who == "model" else who: values for who, values in maps.items()}
        crps_maps(named, title).save(files["crps_maps"])
    if evaluation.draws:
        for kind, clips in shown_clips(evaluation).items():
            files |= write_sheet(evaluation, pictures / kind, clips, "random" if kind == "random" else "best")
    write_text(files["table"], table(evaluation, results))
    write_json(files["figures"], results)  # last: with it the evaluation is finished
    return {key: str(path) for key, path in files.items()}


def write_curves(
    metrics: Iterable[str], predictors: dict[str, dict], models: dict[str, dict], folder: Path
) -> dict[str, Path]:
    """Curves over frames of predictors, and of models, which are some of them, over numbers of samples -> name -> path.

    ``predictors`` and ``models``: label -> metric -> entry.
    """
    files = {}
    for metric in metrics:
        if any(found.get(metric, {}).get("per_frame") for found in predictors.values()):
            files[f"curves_{metric}"] = curves(predictors, [metric]).save(folder / f"curves_{metric}.png")
            if metric == "crps":
                drawing = curves(predictors, [metric], inverse=True)
                files["curves_inverse_crps"] = drawing.save(folder / "curves_inverse_crps.png")
        sampled = {label: found[metric] for label, found in models.items() if found.get(metric, {}).get("best_of")}
        if sampled:
            files[f"ablation_{metric}"] = ablation(sampled, metric).save(folder / f"ablation_{metric}.png")
    return files


def maps_title(results: dict) -> str:
    """Of which clips and frames the maps of CRPS are."""
    chosen = results["settings"]["crps_map"]
    if chosen is None:
        return f"mean over {results['data']['n_clips']} clips and {results['protocol']['n_predicted']} predicted frames"
    return f"clip {chosen['clip']}, predicted frame {chosen['frame']}"


def read_maps(path: str | Path) -> tuple[dict[str, Float[Tensor, "H W"]], str]:
    """The maps of CRPS that belong to a result -> (who -> (H, W), their title); ({}, "") where it has none.

    Args:
        path: of the result, as ``write_report`` named it.
    """
    path = path.with_suffix("") / MAPS
    if not path.is_file():
        return {}, ""
    try:
        with safe_open(path, framework="pt") as file:
            return {who: file.get_tensor(who) for who in file.keys()}, (file.metadata() or {}).get("title", "")
    except SafetensorError as error:
        raise OSError(f"{path}: cannot be read ({one_line(error, 200)})") from None


def shown_clips(evaluation: Evaluation) -> dict[str, list[int]]:
    """ "best", "worst" and "random" -> clips, by the mean squared error of a clip's best sample."""
    errors = evaluation.clip_errors()
    ordered = sorted(errors, key=errors.get)
    drawn = random.Random(evaluation.protocol.seed).sample(sorted(errors), min(N_SHOWN, len(errors)))
    return {"best": ordered[:N_SHOWN], "worst": ordered[::-1][:N_SHOWN], "random": drawn}


def write_sheet(evaluation: Evaluation, stem: Path, clips: Sequence[int], sample: str) -> dict[str, Path]:
    """``stem``.png: a row of truth above one of prediction for each clip; ``stem``.mp4: truths above predictions."""
    rows, cells = [], {"truth": [], "prediction": []}
    for clip in clips:
        context, future, samples = evaluation.shown(clip)
        pair = dict(zip(cells, rows_of(context, future, samples[sample][None]).values()))
        places = picked(len(pair["truth"]), N_COLUMNS, keep=len(context) - 1)
        rows += [(f"clip {clip}\n{name}", frames[places]) for name, frames in pair.items()]
        for name, frames in pair.items():
            cells[name].append((f"clip {clip}: {name}", frames))
    names = frame_names(len(context), len(future))
    files = {f"{stem.name}_sheet": stem.with_suffix(".png"), f"{stem.name}_video": stem.with_suffix(".mp4")}
    scale, columns = scale_for(context.shape[-2]), [names[place] for place in places]
    title = f"{evaluation.label}, {stem.name} clips by mean squared error. {LEGEND}"
    if stem.name == "random":
        title = f"{evaluation.label}, clips at random. {LEGEND}"
    write_image(files[f"{stem.name}_sheet"], labelled_sheet(rows, columns, title, scale))
    titles = [f"frame {name}" for name in names]
    video = labelled_videos([cell for row in cells.values() for cell in row], titles, scale, columns=len(clips))
    write_video(files[f"{stem.name}_video"], video, evaluation.dataset.fps)
    return files


def table(evaluation: Evaluation, results: dict) -> str:
    """The figures as Markdown."""
    protocol, data, model = results["protocol"], results["data"], results["model"]
    rows = {model["name"]: results["metrics"]} | results["baselines"]
    metrics = measured(rows.values())
    heads = [HEADINGS[name] for name in metrics]
    multiplier = protocol["fps_multiplier"]
    n_videos = len(set(evaluation.video_of.values()))
    rate = f" at {multiplier} times the context's frame rate" if multiplier > 1 else ""
    lines = [
        f"# {model['name']} under the protocol {protocol['name']}",
        "",
        f"{protocol['n_context']} context frames, {protocol['n_predicted']} predicted{rate}, "
        f"{protocol['n_samples']} samples; {data['n_clips']} clips of {data['name']} ({data['split']}), "
        f"{size_text(protocol['frame_size'])} pixels. "
        "psnr, ssim, lpips and mse: the best sample of each clip by its mean over frames, "
        "for each metric by itself, and in a row of its own the mean of all samples. Intervals: 95 % of the mean over "
        f"clips, by Student's t over the {n_videos} videos that they come from.",
        "",
        "| | " + " | ".join(heads) + " |",
        "|---|" + "---|" * len(metrics),
    ]
    if means := mean_of_samples(results["metrics"]):
        rows = {model["name"]: results["metrics"], f"{model['name']}, mean of the samples": means} | rows
    for label, found in rows.items():
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
