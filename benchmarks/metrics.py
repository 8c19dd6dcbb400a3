"""Speed of the metrics: FVD features, LPIPS, SSIM and CRPS; and what LPIPS adds to its network's own forward.

    python benchmarks/metrics.py [--only lpips,ssim,fvd,crps]

The networks' weights are needed: see tools/fetch_weights.py.
"""

from common import compare, run_parts, say, seconds  # isort: skip  (sets the thread policy before torch loads)

import torch

from latentcast.metrics import I3D, LPIPS, crps, ssim

DEVICES = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]


def videos(batch, n_frames, size, device, channels=3):
    return torch.rand(batch, n_frames, channels, size, size, device=device) * 2 - 1


@torch.no_grad()
def lpips():
    """LPIPS of 64 pairs of 64 x 64 and 16 pairs of 128 x 128 frames, against the same forward of the bare network.

    The two take turns and the median of the rounds counts, so that a machine that slows down slows both.
    """
    ratios = {}
    for device in DEVICES:
        for net in ("alex", "vgg"):
            metric = LPIPS(net).to(device)
            for batch, size in ((4, 64), (1, 128)):
                x, y = (videos(batch, 16, size, device) for _ in range(2))

                def whole(x=x, y=y, metric=metric):
                    metric(x, y)

                def bare(x=x, y=y, metric=metric):
                    for frames in (x, y):
                        for chunk in frames.flatten(0, 1).split(metric._step(frames)):
                            for _ in metric.stages(chunk):
                                pass

                ratio, whole_s, bare_s = compare(whole, bare, device)
                say(
                    f"  lpips {net} {size} px {device}: {batch * 16 / whole_s:.0f} pairs/s, network alone "
                    f"{batch * 16 / bare_s:.0f}: +{100 * (ratio - 1):.1f} %"
                )
                ratios[f"lpips_{net}_{size}_vs_network{'_gpu' * (device == 'cuda')}"] = ratio
    return ratios


@torch.no_grad()
def fvd():
    """I3D features of videos of 16 frames of 64 x 64, resized to 224 x 224."""
    for device in DEVICES:
        detector = I3D().to(device)
        clips = videos(2 if device == "cpu" else 32, 16, 64, device)
        detector(clips[:1])
        time = seconds(lambda clips=clips, detector=detector: detector(clips), device, repeat=2)
        say(f"  fvd features {device}: {len(clips) * 16 / time:.1f} frames/s, {len(clips) / time:.2f} videos/s")
    return {}


@torch.no_grad()
def ssim_speed():
    """SSIM of 64 x 64 frames, both windows."""
    for device in DEVICES:
        x, y = (videos(8, 16, 64, device) for _ in range(2))
        for window in ("gaussian", "uniform"):
            ssim(x, y, window)
            time = seconds(lambda x=x, y=y, window=window: ssim(x, y, window), device, repeat=5)
            say(f"  ssim {window} {device}: {8 * 16 / time:.0f} frames/s")
    return {}


@torch.no_grad()
def crps_speed():
    """CRPS of 100 samples of one clip of 16 frames, 3 x 64 x 64, against the definition's loop over 256 levels."""
    ratios = {}
    for device in DEVICES:
        target = ((videos(1, 16, 64, device) + 1) * 127.5).round() / 127.5 - 1
        samples = ((torch.rand(1, 100, *target.shape[1:], device=device)) * 255).round() / 127.5 - 1
        ratio, fast, slow = compare(
            lambda s=samples, t=target: crps(s, t), lambda s=samples, t=target: crps_by_levels(s, t), device, rounds=3
        )
        assert torch.allclose(crps(samples, target), crps_by_levels(samples, target), atol=1e-2)
        say(f"  crps S = 100 {device}: {16 / fast:.1f} frames/s; by levels {16 / slow:.2f}")
        ratios[f"crps_vs_levels{'_gpu' * (device == 'cuda')}"] = 1 / ratio
    return ratios


def crps_by_levels(samples, target):
    """The sum over z of (F(z) - 1{y <= z})^2, level by level, for 8-bit frames."""
    samples, target = (((x + 1) * 127.5).round().to(torch.uint8) for x in (samples, target))
    total = torch.zeros(target.shape, device=target.device)
    for level in range(255):
        total += ((samples <= level).float().mean(1) - (target <= level).float()).square()
    return total.mean((-3, -2, -1))


if __name__ == "__main__":
    run_parts(__doc__.splitlines()[0], {"lpips": lpips, "fvd": fvd, "ssim": ssim_speed, "crps": crps_speed})
