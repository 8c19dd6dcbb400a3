"""Frechet distance between Gaussians, and the Frechet video distance."""

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from latentcast.shapes import Frames, Futures, Scalar

from .frame import SAMPLES, VIDEOS, check_videos
from .statistics import ClipValues, Indices

SHARES = np.linspace(0.5, 1, 6)  # of the videos, in the subsets that the extrapolation fits a line through
N_DRAWS = 4  # subsets of each size
MIN_EXTRAPOLATED = 100  # videos


Vector = Float[Tensor, " D"] | Float[np.ndarray, " D"]
Matrix = Float[Tensor, "D D"] | Float[np.ndarray, "D D"]


def frechet_distance(mu1: Vector, sigma1: Matrix, mu2: Vector, sigma2: Matrix) -> Scalar:
    """Squared Frechet (2-Wasserstein) distance between two Gaussians, a float64 scalar tensor, never negative.

    |mu1 - mu2|^2 + tr(sigma1 + sigma2 - 2 (sigma1 sigma2)^(1/2)), Dowson & Landau 1982. With sigma = F F^T the trace of
    the root is the sum of the singular values of F1^T F2, so all is real, also where a covariance is singular.

    Args:
        mu1, mu2: means (D,), tensors or arrays.
        sigma1, sigma2: covariances (D, D), symmetric and positive semi-definite.
    Raises:
        ValueError: unlike sizes, NaN or infinity, or a matrix that is no covariance.
    """
    mu1, sigma1, mu2, sigma2 = (torch.as_tensor(x).detach().double() for x in (mu1, sigma1, mu2, sigma2))
    if mu1.ndim != 1 or mu2.shape != mu1.shape or {sigma1.shape, sigma2.shape} != {(len(mu1), len(mu1))}:
        found = ", ".join(str(tuple(x.shape)) for x in (mu1, sigma1, mu2, sigma2))
        raise ValueError(f"frechet distance: expected means (D,) and covariances (D, D), found {found}")
    root = torch.linalg.svdvals(_factor(sigma1, "sigma1").T @ _factor(sigma2, "sigma2")).sum()
    distance = (mu1 - mu2).square().sum() + sigma1.trace() + sigma2.trace() - 2 * root
    if not distance.isfinite():
        raise ValueError("frechet distance: expected finite means and covariances, found NaN or infinity")
    return distance.clamp(min=0)


def _factor(sigma, name):
    """F (D, D) with F F^T = sigma."""
    if not sigma.isfinite().all():
        raise ValueError(f"frechet distance: expected a finite {name}, found NaN or infinity")
    values, vectors = torch.linalg.eigh((sigma + sigma.T) / 2)
    scale = values.abs().max()
    if values[0] < -1e-6 * scale or (sigma - sigma.T).abs().max() > 1e-6 * scale:
        raise ValueError(f"frechet distance: {name} is not symmetric and positive semi-definite")
    # Eigenvalues that are rounding errors of 0: their roots would be a thousand times larger than any other error.
    noise = scale * len(values) * torch.finfo(values.dtype).eps
    return vectors * values.where(values > noise, 0).sqrt()


class FVD:
    """Frechet video distance (Unterthiner et al. 2018) between real and generated videos, over all that was added.

    The squared Frechet distance between Gaussians fitted to the detector's features, with the unbiased covariance, in
    float64. Features are kept, frames are not: 3.2 kB a video, so that batches and ranks may share the videos in any
    way, single clips may be added again from disk, and extrapolation can draw subsets.

    Published values depend on the detector, the number of videos, their frames and their size: see ``fingerprint`` for
    the first, ``n_videos`` for the second. All videos must have one length and size.

    Args:
        detector: a function of videos (B, T, C, H, W) in [-1, 1] that returns features (B, D), and whose
            ``fingerprint`` names it; None: ``I3D()``. A network is moved to where the videos are.
    """

    def __init__(self, detector: nn.Module | None = None) -> None:
        if detector is None:
            from .i3d import I3D

            detector = I3D()
        self.detector = detector
        self.reset()

    @property
    def fingerprint(self) -> str:
        """The detector's."""
        return str(self.detector.fingerprint)

    def reset(self) -> None:
        """Forget all videos."""
        self.real, self.fake = ClipValues(), ClipValues()
        self._shape = None

    def to(self, device: torch.device | str) -> "FVD":
        """Move the detector, as the first videos also would; features stay on the CPU."""
        self.detector.to(device)
        return self

    @torch.no_grad()
    def features(self, videos: Frames | Futures, name: str = "videos") -> Float[Tensor, "B D"] | Float[Tensor, "B S D"]:
        """Of videos in [-1, 1], or of S samples of each clip.

        Raises:
            ValueError: NaN, values outside [-1, 1], or what the detector refuses.
        """
        layout = SAMPLES if torch.is_tensor(videos) and videos.ndim == 6 else VIDEOS
        videos = check_videos(f"FVD: {name}", videos, layout)
        if isinstance(self.detector, torch.nn.Module):
            self.detector.to(videos.device)
        if layout == VIDEOS:
            return self.detector(videos)
        return self.detector(videos.flatten(0, 1)).unflatten(0, videos.shape[:2])

    def update(
        self,
        real: Frames | None = None,
        fake: Float[Tensor, "N T C H W"] | Float[Tensor, "N S T C H W"] | None = None,
        clips: Indices | None = None,
    ) -> None:
        """Add real or generated videos, or both; their numbers may differ.

        Args:
            real: in [-1, 1].
            fake: the same, or S samples of each clip, all of which count.
            clips: indices of the clips in the data set. With torch.distributed, a clip that several ranks hold
                (as DistributedSampler's do) then counts once.
        Raises:
            ValueError: as `features`; another length or size than before; a clip that was there before.
        """
        videos = {name: side for name, side in (("real", real), ("fake", fake)) if side is not None}
        features = {name: self.features(side, name) for name, side in videos.items()}
        expected = self._shape
        for name, side in videos.items():
            shape = tuple(side.shape[-4:])
            expected = expected or shape
            if shape != expected:
                raise ValueError(f"FVD: {name}: expected (T, C, H, W) = {expected} as before, found {shape}")
        self.add(**features, clips=clips)
        self._shape = expected

    def add(
        self,
        real: Float[Tensor, "B D"] | None = None,
        fake: Float[Tensor, "N D"] | Float[Tensor, "N S D"] | None = None,
        clips: Indices | None = None,
    ) -> None:
        """Like ``update``, with what ``features`` returned for the videos."""
        for name, features in (("real", real), ("fake", fake)):
            if features is not None:
                getattr(self, name).update(features, clips)

    @property
    def n_videos(self) -> dict[str, int]:
        """{"real": n, "fake": n} on this rank."""
        return {name: len(features) for name, features in self._collect(self.real, self.fake).items()}

    def compute(self, extrapolate: bool = False) -> float:
        """The distance, a float; with torch.distributed over the videos of all ranks, each of which must call it.

        Args:
            extrapolate: estimate the value for infinitely many videos. FVD of N videos is too large by about c / N, so
                a line in 1 / N through the values of random subsets is read off at 0 (Chong & Forsyth 2020, FID
                infinity; there only generated images are subsets, here both sides in the same share). The seed is
                fixed. It corrects most of the bias where N is well above the number of features that vary. Clamped
                at 0.
        Raises:
            ValueError: fewer than 2 videos on either side, fewer than 100 to extrapolate from.
        """
        features = self._collect(self.real.gather(), self.fake.gather())
        minimum = MIN_EXTRAPOLATED if extrapolate else 2
        counts = {name: len(rows) for name, rows in features.items()}
        if min(counts.values()) < minimum:
            raise ValueError(
                f"FVD: expected at least {minimum} real and {minimum} fake videos{' to extrapolate' * extrapolate}, "
                f"found {counts['real']} and {counts['fake']}"
            )
        real, fake = features["real"], features["fake"]
        return _extrapolated(real, fake) if extrapolate else _distance(real, fake)

    @staticmethod
    def _collect(real, fake):
        """-> name -> (n, D) float64 array"""
        sides = {"real": real, "fake": fake}
        return {
            name: rows.values.reshape(-1, rows.values.shape[-1]) if len(rows) else np.empty((0, 0))
            for name, rows in sides.items()
        }


def _distance(real, fake):
    moments = (moment for rows in (real, fake) for moment in (rows.mean(0), np.cov(rows, rowvar=False, ddof=1)))
    return frechet_distance(*(np.atleast_1d(m) for m in moments)).item()


def _extrapolated(real, fake):
    rng = np.random.default_rng(0)

    def subset_distance(share):
        return _distance(*(rng.permutation(rows)[: round(share * len(rows))] for rows in (real, fake)))

    values = [np.mean([subset_distance(share) for _ in range(N_DRAWS)]) for share in SHARES]
    _, at_infinity = np.polyfit(1 / SHARES, values, 1)
    return max(float(at_infinity), 0.0)
