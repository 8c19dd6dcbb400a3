"""Whether two results compare, and their paired differences."""

from latentcast.metrics.statistics import paired_bootstrap
from latentcast.yaml_text import flattened

from .protocol import without_other_splits
from .results import UNWRITTEN

# They choose the frames of a clip that are compared, and what of them.
CLIP_FIELDS = {"split", "n_clips", "frame_size", "n_context", "n_predicted", "fps_multiplier", "rounded"}
SETTINGS = {  # what changes a metric on the same frames
    "psnr": {"psnr"},
    "ssim": {"ssim"},
    "lpips": {"lpips", "detector.lpips"},
    "ilpips": {"ilpips", "lpips", "detector.lpips"},
    "crps": {"crps"},
}


def differences(first: dict, second: dict) -> dict[str, tuple]:
    """All that keeps two results from being compared: field -> (value in the first, value in the second)."""
    sides = [_compared(result) for result in (first, second)]
    fields = dict.fromkeys(field for side in sides for field in side)
    found = {field: tuple(side.get(field) for side in sides) for field in fields}
    found = {field: (one, other) for field, (one, other) in found.items() if one != other}
    if any(field.startswith("data.") and field != "data.clips" for field in found):
        found.pop("data.clips", None)  # it follows from them
    return found


def describe_differences(found: dict[str, tuple]) -> str:
    """``differences`` as text: "n_context 5 and 2; seed 0 and 1"."""
    return "; ".join(f"{field} {_short(one)} and {_short(other)}" for field, (one, other) in found.items())


def paired(first: dict, second: dict) -> dict[str, dict]:
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


def _compared(result):
    """field -> value of all that comparable results share."""
    protocol = UNWRITTEN | {key: value for key, value in result["protocol"].items() if key not in ("name", "source")}
    described = without_other_splits(result["data"]["describe"], protocol.get("split"))
    data = described | {key: result["data"][key] for key in ("name", "n_clips")}
    digest = {"data.clips": result["data"]["sha256"]}  # of the description and which clips
    return protocol | flattened({"detector": result["detector"], "data": data}) | digest


def _short(value):
    """Long values, checksums mostly, by their beginning."""
    text = str(value)
    return text if len(text) <= 40 else f"{text[:12]}…"
