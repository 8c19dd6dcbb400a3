"""Results of tools/evaluate.py: their schema, and what is taken out of them."""

from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, model_validator

from latentcast.files import read_json
from latentcast.schemas import Count, Number, Schema, Text, Whole, check
from latentcast.sizes import Size

from .protocol import METRICS

UNWRITTEN = {"fps_multiplier": 1, "psnr": "frame", "rounded": False}  # what a protocol that does not name it has
Interval = Annotated[list[Number], Field(min_length=2, max_length=2)]


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


def read_result(path: str | Path) -> dict:
    """What tools/evaluate.py wrote, checked.

    Raises:
        OSError, ValueError: no such file, damaged, or not a result; one line.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    return check(path, Result, read_json(path))


def measured(found: Iterable[dict]) -> list[str]:
    """The metrics that any of ``found``, dicts of metrics, has, in their usual order."""
    found = list(found)
    return [metric for metric in METRICS if any(metric in metrics for metrics in found)]


def mean_of_samples(metrics: dict[str, dict]) -> dict[str, dict]:
    """metric -> entry of the mean of all samples, where several were drawn and the metric takes the best of them."""
    return {name: entry["mean_of_samples"] for name, entry in metrics.items() if entry.get("n_samples", 1) > 1}
