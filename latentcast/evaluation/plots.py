"""Plots of evaluations: curves over frames, best of N, maps of CRPS. Each returns its matplotlib Figure."""

import numpy as np

from latentcast.files import printable, replacing

HEADINGS = {
    "mse": "MSE ↓",
    "clip_mse": "MSE of the whole clip ↓",
    "psnr": "PSNR, dB ↑",
    "ssim": "SSIM ↑",
    "lpips": "LPIPS ↓",
    "crps": "CRPS, of 255 ↓",
    "ilpips": "iLPIPS ↑",
    "fvd": "FVD ↓",
    "bits": "bits/dim ↓",
}


def curves(path, named, metric, inverse=False):
    """A metric over the predicted frames, with 95 % intervals: HAF-SVG, Figure 6.

    Args:
        path: of the PNG file.
        named: label -> entry with ``per_frame`` and ``per_frame_ci95``; those without are left out.
        metric: name of the metric, for the axis.
        inverse: draw 1 / value: RVD, Figure 3, for CRPS. Frames where it is not positive are left out.
    Raises:
        ValueError: no entry has values of single frames.
    """
    named = {label: entry for label, entry in named.items() if entry.get("per_frame")}
    if not named:
        raise ValueError(f"curves of {metric}: expected values per frame, found none")
    title = HEADINGS.get(metric, metric)
    if inverse:
        title = f"1 / {metric.upper()} ↑"
    figure, (axes,) = _figure(1, xlabel="predicted frame", ylabel=title)
    for number, (label, entry) in enumerate(named.items()):
        _curve(axes, entry, inverse, label=_text(label), color=f"C{number % 10}")
    axes.legend()
    return _save(figure, path)


def ablation(path, named, metric):
    """Best of n samples, for each n in ``best_of`` and all samples: means, and curves over the frames.

    HAF-SVG, Figure 7.

    Args:
        path: of the PNG file.
        named: label -> entry as ``BestOfN.compute`` gives it.
        metric: name of the metric, for the axis.
    """
    title = HEADINGS.get(metric, metric)
    figure, (means, frames) = _figure(2, ylabel=title)
    means.set_xlabel("samples")
    frames.set_xlabel("predicted frame")
    for number, (label, entry) in enumerate(named.items()):
        by_count = {int(n): best for n, best in entry.get("best_of", {}).items()} | {entry["n_samples"]: entry}
        counts, color = sorted(by_count), f"C{number % 10}"
        values = np.array([by_count[n]["mean"] for n in counts])
        intervals = np.array([by_count[n]["ci95"] or [value] * 2 for n, value in zip(counts, values)])
        errors = np.abs(intervals.T - values)
        means.errorbar(counts, values, errors, marker="o", capsize=3, label=_text(label), color=color)
        for n, style in zip(counts, ("-", "--", ":", "-.") * len(counts)):
            if by_count[n].get("per_frame"):
                _curve(frames, by_count[n], label=_text(f"{label}, {n}"), color=color, linestyle=style)
    for axes in (means, frames):
        axes.legend()
    return _save(figure, path)


def crps_maps(path, named, title=""):
    """CRPS of each pixel, 0 to 255, a panel each, all on one scale: the darker, the farther from the truth.

    RVD, Figure 4.

    Args:
        path: of the PNG file.
        named: label -> (H, W), finite.
        title: over all panels: of which clips and frames.
    """
    named = {label: np.asarray(values, dtype=np.float64) for label, values in named.items()}
    for label, values in named.items():
        if values.ndim != 2 or not np.isfinite(values).all():
            found = f"shape {values.shape}, or NaN or infinity"
            raise ValueError(f"map of CRPS, {label}: expected finite values (H, W), found {found}")
    figure, panels = _figure(len(named), width=3.5)
    low, high = min(0, *(values.min() for values in named.values())), max(values.max() for values in named.values())
    for axes, (label, values) in zip(panels, named.items()):
        axes.set_axis_off()
        axes.set_title(_text(label))
        image = axes.imshow(values, cmap="Blues", vmin=low, vmax=high)
    figure.colorbar(image, ax=panels, label="CRPS, of 255")
    figure.suptitle(title)
    return _save(figure, path)


def _text(label):
    """As matplotlib shows it: names may hold bytes that are no text, and dollars, which are no formulas."""
    return printable(label).replace("$", r"\$")


def _figure(n_panels, width=6, **labels):
    from matplotlib.figure import Figure  # not pyplot: no window system is asked for
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(width * n_panels, 4), layout="constrained")
    panels = figure.subplots(1, n_panels, squeeze=False)[0]
    for axes in panels:
        axes.set(**labels)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    return figure, panels


def _curve(axes, entry, inverse=False, **style):
    def drawn(values):
        values = np.asarray(values, dtype=np.float64)
        return 1 / np.where(values > 0, values, np.nan) if inverse else values

    frames = np.arange(1, len(entry["per_frame"]) + 1)
    axes.plot(frames, drawn(entry["per_frame"]), marker=".", **style)
    if entry.get("per_frame_ci95"):
        low, high = np.transpose(entry["per_frame_ci95"])
        axes.fill_between(frames, drawn(low), drawn(high), color=style["color"], alpha=0.2, linewidth=0)


def _save(figure, path):
    with replacing(path) as temporary:
        figure.savefig(temporary, format="png", dpi=100)
    return figure
