"""A protocol's metrics, with the networks that some of them need, and what they say of predictions."""

import collections
from functools import partial
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor

from latentcast.metrics import FVD, I3D, LPIPS, BestOfN, crps, mse, psnr, ssim
from latentcast.metrics.ensemble import mean_of_pairs
from latentcast.metrics.frame import round_to_levels
from latentcast.metrics.weights import find_weights
from latentcast.shapes import Frames, Futures

from .protocol import BEST_OF, Protocol

Truth = tuple[Frames, list[Tensor] | None]  # true frames, and of the network of LPIPS their features


class Scorer:
    """Measures predictions by the metrics of a protocol.

    Args:
        protocol, weights: see Evaluation. device: of the networks.
    Attributes:
        lpips, fvd: None where they are not measured.
        frame_metrics: of each sample, name -> metric; mse always, for it chooses the clips that are shown.
    """

    def __init__(self, protocol: Protocol, weights: str | Path | None, device: torch.device | str) -> None:
        self.protocol, self.lpips, self.fvd = protocol, None, None
        if {"lpips", "ilpips"} & {*protocol.metrics}:
            self.lpips = LPIPS(protocol.lpips, weights).to(device)
        if "fvd" in protocol.metrics:
            self.fvd = FVD(I3D(find_weights(protocol.detector, weights))).to(device)
        metrics = {"mse": mse, "psnr": partial(psnr, of=protocol.psnr), "ssim": partial(ssim, window=protocol.ssim)}
        metrics["lpips"] = self.lpips
        self.frame_metrics = {name: metrics[name] for name in BEST_OF if name in ("mse", *protocol.metrics)}

    @property
    def fingerprints(self) -> dict[str, str | None]:
        """Of the networks, None for those that are not there."""
        return {name: network and network.fingerprint for name, network in (("fvd", self.fvd), ("lpips", self.lpips))}

    def seen(self, frames: Frames | Futures) -> Frames | Futures:
        """Frames as the metrics see them."""
        return round_to_levels(frames) if self.protocol.rounded else frames

    def truth(self, target: Frames) -> Truth:
        """What ``score`` compares with: the true frames, and of the network of LPIPS their features or None."""
        return target, self.lpips.features(target) if "lpips" in self.frame_metrics else None

    def score(
        self, samples: Futures, context: Float[Tensor, "B n_context C H W"], truth: Truth, pairs: bool
    ) -> dict[str, Float[Tensor, "B ..."]]:
        """Figures of futures by name; of crps (B, T, C, H, W), of fvd features.

        Args:
            context: shown before them.
            truth: see there.
            pairs: whether the samples are compared with each other, for ilpips.
        """
        target, features = truth
        metrics = {name: metric for name, metric in self.frame_metrics.items() if name != "lpips"}
        found = BestOfN(metrics).score(samples, target) | self._perceptual(samples, features, pairs)
        if "crps" in self.protocol.metrics:
            # a single prediction has no pairs; both estimators are its absolute error
            estimator = self.protocol.crps if samples.shape[1] > 1 else "standard"
            found["crps"] = crps(samples, target, estimator, reduction="none")
        if self.fvd is not None:
            shown = samples[:, : self.protocol.fvd_samples]
            found["fvd"] = self.video_features(context[:, None].expand(-1, shown.shape[1], -1, -1, -1, -1), shown)
        return found

    def video_features(
        self, context: Float[Tensor, "B n_context C H W"], future: Frames | Futures
    ) -> Float[Tensor, "B ..."]:
        """What FVD keeps of videos."""
        return self.fvd.features(torch.cat([context, future], -4) if self.protocol.fvd_context else future)

    def _perceptual(self, samples, truth, pairs):
        """``lpips`` (B, S, T) and ``ilpips`` (B, T), as far as they are asked for; each picture passes the network
        once. ``truth``: features of the true frames."""
        scores = []

        def features():
            for sample in samples.unbind(1):
                found = self.lpips.features(sample[:, :1] if sample.stride(1) == 0 else sample)
                if truth is not None:
                    scores.append(self.lpips.distance(found, truth))
                yield found

        found = {}
        if pairs and "ilpips" in self.protocol.metrics:
            found["ilpips"] = mean_of_pairs(features(), self.lpips.distance, self.protocol.ilpips)
        elif truth is not None:
            collections.deque(features(), maxlen=0)
        return found | ({"lpips": torch.stack(scores, 1)} if truth is not None else {})
