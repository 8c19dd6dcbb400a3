"""What a figure was measured by: everything that changes it, in one small file under ``configs/protocol/``."""

from typing import Annotated, Literal

from jaxtyping import Shaped
from pydantic import Field, Strict, ValidationError, model_validator
from torch import Tensor

from latentcast.data.base import SPLITS
from latentcast.metrics.frame import PSNR_FORMS, WINDOWS
from latentcast.metrics.i3d import MIN_FRAMES
from latentcast.metrics.perceptual import SMALLEST
from latentcast.schemas import MOST, Count, Schema, Text, explain, one_line
from latentcast.sizes import Size, sides

METRICS = ("mse", "clip_mse", "psnr", "ssim", "lpips", "crps", "ilpips", "fvd", "bits")
UNDRAWN = ("clip_mse", "bits")  # they need no futures
BEST_OF = ("mse", "psnr", "ssim", "lpips")  # per sample: the best one of each clip counts
SSIM_FORMS = tuple(WINDOWS)
LPIPS_NETS = tuple(SMALLEST)
CRPS_ESTIMATORS = ("standard", "fair")
ILPIPS_PAIRS = ("ring", "all")
DETECTORS = ("i3d_k400", "i3d_torchscript")
OF_A_SPLIT = ("n_{}", "{}_frames", "{}_fraction")  # options of a prepared set that shape one split


class Protocol(Schema, extra="forbid"):
    """One way to evaluate. Two results compare when their protocols, data and detectors are equal.

    Attributes:
        name: of the file.
        source: the paper, table or figure whose protocol this is; no part of a comparison.
        data: name of the prepared set it is for (``manifest["name"]``); None: any data set.
        data_protocol: which of the set's protocols (``--split`` of prepare_dataset); None: any.
        data_options: options that the set must have been prepared with, ``{n_digits: 3}`` say.
        split: "val" or "test". Clips of "train" are drawn by a seed, and so other ones under an equal protocol.
        n_clips: so many clips, spread evenly over the split's; None: all.
        frame_size: H = W of the frames that are compared in pixels, or [H, W].
        n_context, n_predicted: frames given and predicted.
        fps_multiplier: predicted frames in an interval of the context, which is every ``fps_multiplier``-th frame of
            the data up to the last one given. Above 1 only for priors over continuous time: STDiff, Table 4.
        n_samples: futures for each clip.
        seed: of the samples.
        metrics: of METRICS. mse, psnr, ssim and lpips: the best of ``n_samples`` counts, for each metric by itself.
            crps and ilpips: of all samples. bits: bits per dimension, of priors with a likelihood; beside other
            metrics a prior without one goes without. clip_mse: of the baseline `reconstruction` alone, over the
            frames that are given too: LVT, Tables 1 and 4.
        best_of: smaller numbers of samples to report the best of, too.
        rounded: frames are rounded to 8 bits before every metric, as saved pictures are; what the prior is given,
            and what it feeds back, is not.
        psnr: "frame", of the error over all channels, or "channel", the mean over the channels of each one's own.
        ssim: "gaussian" or "uniform" window.
        lpips: "alex" or "vgg".
        crps: "standard" or "fair" estimator.
        ilpips: "ring" or "all" pairs.
        detector: of FVD: "i3d_k400", our own network with the published weights, or "i3d_torchscript", the scripted
            file that many papers call, found where the weights are.
        fvd_context: whether the videos that FVD compares include the context frames.
        fvd_samples: futures of each clip among the generated videos.
        fvd_debiased: extrapolate to infinitely many videos.
    Raises:
        ValueError: a field of another kind or out of range.
    """

    name: Annotated[Text, Field(pattern="^[^/]+$")]
    source: Text = ""
    data: Text | None = None
    data_protocol: Text | None = None
    data_options: dict = Field(default_factory=dict)
    split: Literal["val", "test"] = "test"
    n_clips: Count | None = 256
    frame_size: Size = 64
    n_context: Count
    n_predicted: Count
    fps_multiplier: Count = 1
    n_samples: Count = 1
    seed: Annotated[int, Field(ge=-MOST, le=MOST)] = 0
    metrics: Annotated[tuple[Literal[METRICS], ...], Strict(False), Field(min_length=1)] = (
        "psnr",
        "ssim",
        "lpips",
        "fvd",
    )
    best_of: Annotated[tuple[Count, ...], Strict(False)] = ()
    rounded: bool = False
    psnr: Literal[PSNR_FORMS] = "frame"
    ssim: Literal[SSIM_FORMS] = "gaussian"
    lpips: Literal[LPIPS_NETS] = "alex"
    crps: Literal[CRPS_ESTIMATORS] = "standard"
    ilpips: Literal[ILPIPS_PAIRS] = "ring"
    detector: Literal[DETECTORS] = "i3d_k400"
    fvd_context: bool = True
    fvd_samples: Count = 1
    fvd_debiased: bool = False

    def __init__(self, **fields: object) -> None:
        try:
            super().__init__(**fields)
        except ValidationError as error:
            raise ValueError(f"protocol {one_line(fields.get('name'))}: {explain(error)}") from None

    @model_validator(mode="after")
    def _agree(self):
        of_model = {*self.metrics} != {"clip_mse"}
        self._expect("metrics", of_model, "one beside clip_mse, which is of the baseline reconstruction alone")
        whole = self.fps_multiplier == 1 or "bits" not in self.metrics
        self._expect("fps_multiplier", whole, "1 for bits, which are of frames that follow each other")
        fewest = 2 if "ilpips" in self.metrics or ("crps" in self.metrics and self.crps == "fair") else 1
        self._expect("n_samples", self.n_samples >= fewest, f"at least {fewest} for ilpips and fair crps")
        counts = all(n <= self.n_samples for n in self.best_of)
        self._expect("best_of", counts, f"whole numbers from 1 to n_samples={self.n_samples}")
        self._expect("fvd_samples", self.fvd_samples <= self.n_samples, f"at most n_samples={self.n_samples}")
        smallest = {"ssim": WINDOWS[self.ssim], "lpips": SMALLEST[self.lpips], "ilpips": SMALLEST[self.lpips]}
        for metric in smallest.keys() & {*self.metrics}:
            enough = min(sides(self.frame_size)) >= smallest[metric]
            self._expect("frame_size", enough, f"at least {smallest[metric]} for {metric}")
        if "fvd" in self.metrics:
            found = self.n_predicted + self.fvd_context * self.n_context
            enough = found >= MIN_FRAMES
            self._expect("n_predicted", enough, f"at least {MIN_FRAMES} frames a video for fvd, here {found}")
        return self

    def _expect(self, name, holds, expected):
        if not holds:
            raise ValueError(f"{name}: expected {expected}, found {getattr(self, name)!r}")

    @property
    def n_frames(self) -> int:
        """Frames a clip needs."""
        return self._given.stop + self.n_predicted

    def divide(
        self, frames: Shaped[Tensor, "*clips n_frames C H W"]
    ) -> tuple[Shaped[Tensor, "*clips n_context C H W"], Shaped[Tensor, "*clips n_predicted C H W"]]:
        """Context and future."""
        return frames[..., self._given, :, :, :], frames[..., self._given.stop :, :, :, :]

    @property
    def _given(self):
        return slice(0, (self.n_context - 1) * self.fps_multiplier + 1, self.fps_multiplier)

    def describe(self) -> dict:
        """JSON-able: every field that two comparable results share."""
        described = self.model_dump()
        return {name: described[name] for name in sorted(described) if name not in ("name", "source")}


def without_other_splits(described: dict, split: str) -> dict:
    """What ``VideoDataset.describe`` gave, without the options of a prepared set that shape other splits.

    A set prepared with more training videos has the same test clips, and ``sha256`` says so.
    """
    if not isinstance(described.get("protocol"), dict):
        return described
    others = {option.format(other) for option in OF_A_SPLIT for other in SPLITS if other != split}
    options = {name: value for name, value in described["protocol"].items() if name not in others}
    return described | {"protocol": options}
