"""What a figure was measured by: everything that changes it, in one small file under ``configs/protocol/``."""

from dataclasses import asdict, dataclass, field

from latentcast.config import is_whole
from latentcast.data.base import SPLITS
from latentcast.metrics.frame import PSNR_FORMS, WINDOWS
from latentcast.metrics.i3d import MIN_FRAMES
from latentcast.metrics.perceptual import SMALLEST

METRICS = ("mse", "clip_mse", "psnr", "ssim", "lpips", "crps", "ilpips", "fvd", "bits")
UNDRAWN = ("clip_mse", "bits")  # they need no futures
BEST_OF = ("mse", "psnr", "ssim", "lpips")  # per sample: the best one of each clip counts
SSIM_FORMS = tuple(WINDOWS)
LPIPS_NETS = tuple(SMALLEST)
CRPS_ESTIMATORS = ("standard", "fair")
ILPIPS_PAIRS = ("ring", "all")
DETECTORS = ("i3d_k400", "i3d_torchscript")
OF_A_SPLIT = ("n_{}", "{}_frames", "{}_fraction")  # options of a prepared set that shape one split


@dataclass(frozen=True, kw_only=True)
class Protocol:
    """One way to evaluate. Two results compare when their protocols, data and detectors are equal.

    Attributes:
        name: of the file.
        source: the paper, table or figure whose protocol this is; no part of a comparison.
        data: name of the prepared set it is for (``manifest["name"]``); None: any data set.
        data_protocol: which of the set's protocols (``--split`` of prepare_dataset); None: any.
        data_options: options that the set must have been prepared with, ``{n_digits: 3}`` say.
        split: "val" or "test". Clips of "train" are drawn by a seed, and so other ones under an equal protocol.
        n_clips: so many clips, spread evenly over the split's; None: all.
        frame_size: H = W of the frames that are compared, pixels.
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

    name: str
    source: str = ""
    data: str | None = None
    data_protocol: str | None = None
    data_options: dict = field(default_factory=dict)
    split: str = "test"
    n_clips: int | None = 256
    frame_size: int = 64
    n_context: int
    n_predicted: int
    fps_multiplier: int = 1
    n_samples: int = 1
    seed: int = 0
    metrics: tuple = ("psnr", "ssim", "lpips", "fvd")
    best_of: tuple = ()
    rounded: bool = False
    psnr: str = "frame"
    ssim: str = "gaussian"
    lpips: str = "alex"
    crps: str = "standard"
    ilpips: str = "ring"
    detector: str = "i3d_k400"
    fvd_context: bool = True
    fvd_samples: int = 1
    fvd_debiased: bool = False

    def __post_init__(self):
        for name in ("metrics", "best_of"):
            self._expect(name, isinstance(getattr(self, name), (list, tuple)), "a list")
            object.__setattr__(self, name, tuple(getattr(self, name)))
        self._expect("name", isinstance(self.name, str) and self.name and "/" not in self.name, "the name of a file")
        self._expect("data_options", isinstance(self.data_options, dict), "options and their values")
        self._expect("seed", is_whole(self.seed), "a whole number")
        for name in ("n_context", "n_predicted", "fps_multiplier", "n_samples", "frame_size", "fvd_samples"):
            self._expect(name, is_whole(getattr(self, name), 1), "a whole number of at least 1")
        clips = self.n_clips is None or is_whole(self.n_clips, 1)
        self._expect("n_clips", clips, "a whole number of at least 1, or null for all")
        for name in ("rounded", "fvd_context", "fvd_debiased"):
            self._expect(name, isinstance(getattr(self, name), bool), "true or false")
        known_metrics = self.metrics and all(metric in METRICS for metric in self.metrics)
        self._expect("metrics", known_metrics, f"some of {', '.join(METRICS)}")
        of_model = {*self.metrics} != {"clip_mse"}
        self._expect("metrics", of_model, "one beside clip_mse, which is of the baseline reconstruction alone")
        for name, known in (
            ("split", ("val", "test")),
            ("psnr", PSNR_FORMS),
            ("ssim", SSIM_FORMS),
            ("lpips", LPIPS_NETS),
            ("crps", CRPS_ESTIMATORS),
            ("ilpips", ILPIPS_PAIRS),
            ("detector", DETECTORS),
        ):
            self._expect(name, getattr(self, name) in known, f"one of {', '.join(known)}")
        whole = self.fps_multiplier == 1 or "bits" not in self.metrics
        self._expect("fps_multiplier", whole, "1 for bits, which are of frames that follow each other")
        fewest = 2 if "ilpips" in self.metrics or ("crps" in self.metrics and self.crps == "fair") else 1
        self._expect("n_samples", self.n_samples >= fewest, f"at least {fewest} for ilpips and fair crps")
        counts = all(is_whole(n, 1) and n <= self.n_samples for n in self.best_of)
        self._expect("best_of", counts, f"whole numbers from 1 to n_samples={self.n_samples}")
        self._expect("fvd_samples", self.fvd_samples <= self.n_samples, f"at most n_samples={self.n_samples}")
        smallest = {"ssim": WINDOWS[self.ssim], "lpips": SMALLEST[self.lpips], "ilpips": SMALLEST[self.lpips]}
        for metric in smallest.keys() & {*self.metrics}:
            enough = self.frame_size >= smallest[metric]
            self._expect("frame_size", enough, f"at least {smallest[metric]} for {metric}")
        if "fvd" in self.metrics:
            found = self.n_predicted + self.fvd_context * self.n_context
            enough = found >= MIN_FRAMES
            self._expect("n_predicted", enough, f"at least {MIN_FRAMES} frames a video for fvd, here {found}")

    def _expect(self, name, holds, expected):
        if not holds:
            raise ValueError(f"protocol {self.name}: {name}: expected {expected}, found {getattr(self, name)!r}")

    @property
    def n_frames(self):
        """Frames a clip needs."""
        return self._given.stop + self.n_predicted

    def divide(self, frames):
        """(..., n_frames, C, H, W) -> context (..., n_context, C, H, W), future (..., n_predicted, C, H, W)"""
        return frames[..., self._given, :, :, :], frames[..., self._given.stop :, :, :, :]

    @property
    def _given(self):
        return slice(0, (self.n_context - 1) * self.fps_multiplier + 1, self.fps_multiplier)

    def describe(self):
        """JSON-able: every field that two comparable results share."""
        described = asdict(self)
        return {name: described[name] for name in sorted(described) if name not in ("name", "source")}


def without_other_splits(described, split):
    """What ``VideoDataset.describe`` gave, without the options of a prepared set that shape other splits.

    A set prepared with more training videos has the same test clips, and ``sha256`` says so.
    """
    if not isinstance(described.get("protocol"), dict):
        return described
    others = {option.format(other) for option in OF_A_SPLIT for other in SPLITS if other != split}
    options = {name: value for name, value in described["protocol"].items() if name not in others}
    return described | {"protocol": options}
