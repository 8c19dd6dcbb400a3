"""Figures with axes: metrics over frames, codes, latents, losses, drift. Each returns a Drawing."""

import math
from collections import defaultdict

import numpy as np
from PIL import Image

from ..files import printable
from .sheets import cut_name, wrapped
from .style import (
    AMOUNT,
    BAD,
    CONTEXT,
    FADED,
    FAINT,
    INK,
    Drawing,
    as_array,
    colour_of,
    not_finite,
    plain,
)

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
UNITS = {  # of what models log, by the end of its name
    "bits_per_code": "bits a code",
    "kl": "nats",
    "psnr": "dB",
    "ssim": "1: equal",
    "lpips": "0: equal",
    "perplexity": "codes in use",
}
DPI = 100
PANEL = (5.0, 3.5)  # inches, with all around it
AROUND = {"left": 0.85, "right": 0.2, "bottom": 0.6, "top": 0.15}  # inches that a panel's labels take at most
HEADED = 0.25  # inches more above panels that have titles
TITLE, WORDS = 0.36, 0.19  # inches: of the line above all panels, and of each line of words below it
LONGEST_LABEL = 40  # characters
FOR_ANY_TICKS = 1.2  # inches: what the longest labels of ticks take
WIDE = 30  # the largest value over the smallest from which a scale is logarithmic
MOST_MARKED = 30  # points of a line that are marked
MOST_NUMBERED = 12  # bars that have room for numbers
SHARE = 0.8  # of the mass: LVT, appendix A


# Metrics of predictions --------------------------------------------------------------------------------------------


def curves(results, metrics, title="", inverse=False):
    """Metrics over the predicted frames, with 95 % intervals: HAF-SVG, Figure 6.

    Args:
        results: label -> metric -> entry with ``per_frame`` and ``per_frame_ci95``; those without are left out.
        metrics: names, a panel each where any of the results has it.
        inverse: draw 1 / value: RVD, Figure 3, for CRPS. Frames where it is not positive are left out.
    Raises:
        ValueError: no entry has values of single frames.
    """
    found = {
        metric: {label: named[metric] for label, named in results.items() if named.get(metric, {}).get("per_frame")}
        for metric in metrics
    }
    found = {metric: named for metric, named in found.items() if named}
    if not found:
        raise ValueError(f"curves of {', '.join(metrics)}: expected values per frame, found none")
    values = [entry["per_frame"] for named in found.values() for entry in named.values()]
    has_ci = any(entry.get("per_frame_ci95") for named in found.values() for entry in named.values())
    caption = "Mean over the clips" + ", with 95 % intervals." * has_ci + "." * (not has_ci)
    caption += not_finite(*map(as_array, values))
    figure, panels = _figure(len(found), title, caption, columns=2, xlabel="predicted frame")
    colours = _colours(found)
    for axes, (metric, named) in zip(panels, found.items()):
        axes.set_ylabel(f"1 / {metric.upper()} ↑" if inverse else HEADINGS.get(metric, metric))
        for label, entry in named.items():
            _curve(axes, entry, inverse, label=_text(label), color=colours[label])
        _whole(axes.xaxis)
    _legend(panels[0])
    return _drawing("curves", figure, caption)


def ablation(named, metric):
    """Best of n samples, for each n in ``best_of`` and all samples: means, and curves over the frames.

    HAF-SVG, Figure 7.

    Args:
        named: label -> entry as ``BestOfN.compute`` gives it.
        metric: name of the metric, for the axis.
    """
    caption = "The best of n samples of each clip, mean over the clips, with 95 % intervals."
    figure, (means, frames) = _figure(2, "", caption, ylabel=HEADINGS.get(metric, metric))
    means.set_xlabel("samples")
    frames.set_xlabel("predicted frame")
    for number, (label, entry) in enumerate(named.items()):
        by_count = {int(n): best for n, best in entry.get("best_of", {}).items()} | {entry["n_samples"]: entry}
        counts, color = sorted(by_count), colour_of(number)
        values = np.array([by_count[n]["mean"] for n in counts])
        intervals = np.array([by_count[n]["ci95"] or [value] * 2 for n, value in zip(counts, values)])
        errors = np.abs(intervals.T - values)
        means.errorbar(counts, values, errors, marker="o", capsize=3, label=_text(label), color=color)
        for n, style in zip(counts, ("-", "--", ":", "-.") * len(counts)):
            if by_count[n].get("per_frame"):
                _curve(frames, by_count[n], label=_text(f"{label}, {n}"), color=color, linestyle=style)
    for axes in (means, frames):
        _whole(axes.xaxis)
        _legend(axes)
    return _drawing("ablation", figure, caption)


def tradeoff(lines, cost, title=""):
    """Quality over cost, on a logarithmic scale: where the lower left is best.

    Args:
        lines: metric -> label -> pairs (cost, value), a point each, joined in order of cost. A panel a metric; labels
            without points are left out.
        cost: what the cost is, for the axis.
    Raises:
        ValueError: no point, or a cost that is not above 0.
    """
    costs = [at for named in lines.values() for line in named.values() for at, _ in line]
    if not costs or min(costs) <= 0:
        raise ValueError(f"tradeoff: expected points with costs above 0, found {min(costs) if costs else 'none'}")
    caption = "A point a measurement, joined where one model has several: the lower left is best of what shall be low."
    figure, panels = _figure(len(lines), title, caption, columns=3, xlabel=cost)
    colours = _colours(lines)
    for axes, (metric, named) in zip(panels, lines.items()):
        axes.set_ylabel(HEADINGS.get(metric, metric))
        for label, line in named.items():
            if line:
                at, values = zip(*sorted(line))
                axes.plot(at, values, marker="o", label=_text(label), color=colours[label])
        _log(axes, "x")
    _legend(panels[0], most=20)
    return _drawing("tradeoff", figure, caption)


def crps_maps(named, title="", frames=None):
    """CRPS of each pixel, 0 to 255, a panel each, all on one scale: the darker, the farther from the truth.

    RVD, Figure 4.

    Args:
        named: label -> (H, W), a row of panels; or (F, H, W), a column of panels a frame.
        title: over all panels: of which clips and frames.
        frames: F names, of the columns.
    Raises:
        ValueError: another shape.
    """
    named = {label: as_array(values).astype(np.float64) for label, values in named.items()}
    for label, values in named.items():
        if values.ndim != (2 if frames is None else 3):
            raise ValueError(f"map of CRPS, {label}: expected (H, W), or (F, H, W), found shape {values.shape}")
    finite = np.concatenate([values[np.isfinite(values)] for values in named.values()] or [np.zeros(0)])
    low, high = min(0.0, finite.min(initial=0)), max(finite.max(initial=0), 1e-6)
    caption = "The darker, the farther the samples are from the truth; one scale for all."
    caption += not_finite(*named.values())
    rows = (
        [list(named.items())] if frames is None else [[(label, one) for one in maps] for label, maps in named.items()]
    )
    height, width = next(iter(named.values())).shape[-2:]
    side = 2.8 if frames is None else 1.7
    figure, grid, bar = _map_grid(len(rows), len(rows[0]), (side * width / height, side), title, caption)
    for r, (row, panels) in enumerate(zip(rows, grid)):
        for c, ((label, values), axes) in enumerate(zip(row, panels)):
            axes.set_title(_text(label) if frames is None else _text(frames[c]) if r == 0 else "", fontsize=9)
            if frames is not None and c == 0:
                axes.set_ylabel(_text(cut_name(label)), fontsize=9, color=INK)
            image = _map(axes, values, low, high)
    _colour_bar(figure, bar, image, "CRPS, of 255")
    return _drawing("crps_maps", figure, caption, {"mean": float(finite.mean()) if finite.size else math.nan})


def drift(errors, horizon, statistics, n_context, title=""):
    """How a rollout fares beyond the horizon of the training.

    Args:
        errors: label -> entry with ``per_frame``, root mean squared errors of 255, of as many frames as are known, and
            ``per_frame_ci95``.
        horizon: predicted frames of a training clip.
        statistics: name -> label -> (T,), other numbers of each predicted frame, a panel each ("contrast, of 255").
    """
    caption = (
        f"The model was trained to predict {horizon} frames (dashed line). A rollout that is well stays at the true "
        "level on the right, whatever its error; one that fades or explodes leaves it."
    )
    known = [entry["per_frame"] for entry in errors.values()]
    lines = [values for named in statistics.values() for values in named.values()]
    caption += not_finite(*map(as_array, [*known, *lines]))
    figure, panels = _figure(1 + len(statistics), title, caption, xlabel="predicted frame", width=4.6)
    labels = list(dict.fromkeys([*errors, *(label for named in statistics.values() for label in named)]))
    colours = {label: INK if label == "truth" else colour_of(labels.index(label)) for label in labels}
    for label, entry in errors.items():
        _curve(panels[0], entry, label=_text(label), color=colours[label])
    panels[0].set_ylabel("root mean squared error, of 255 ↓")
    panels[0].set_ylim(bottom=0)
    for axes, (name, named) in zip(panels[1:], statistics.items()):
        axes.set_ylabel(name)
        for label, values in named.items():
            _line(axes, range(1, len(values) + 1), as_array(values), label=_text(label), color=colours[label])
        axes.set_ylim(bottom=0)
    for axes in panels:
        axes.axvline(horizon + 0.5, color=FADED, linestyle="--", linewidth=1)
        axes.set_xlim(0, 1 + max(map(len, [*known, *lines])))
        _whole(axes.xaxis)
        _legend(axes)
    numbers = {f"last_rmse_{label}": entry["per_frame"][-1] for label, entry in errors.items()}
    return _drawing("drift", figure, caption, numbers)


# Codes and latents -------------------------------------------------------------------------------------------------


def codes_for(counts, share=SHARE):
    """How many of the most frequent codes hold that share of all: counts (K,) -> whole number, 0 of an empty one."""
    ordered = np.sort(as_array(counts).astype(np.float64))[::-1]
    total = ordered.sum()
    return int(np.searchsorted(ordered.cumsum(), share * total * (1 - 1e-12)) + 1) if total else 0


def code_frequencies(counts, title="", names=None):
    """Sorted code frequencies of each codebook, and how many codes hold 80 % of the mass: LVT, Figure 5.

    Args:
        counts: for each codebook how often each of its codes was chosen, (K,).
        names: of the codebooks; None: "codebook 1" and so on.
    Raises:
        ValueError: a negative count, or none.
    """
    counts = [as_array(book).astype(np.float64) for book in counts]
    if not counts or any((book < 0).any() or not book.size for book in counts):
        raise ValueError("counts: expected a number of at least 0 for each code of each codebook")
    names = names or [f"codebook {number}" for number in range(1, len(counts) + 1)]
    holding, used = [codes_for(book) for book in counts], [int((book > 0).sum()) for book in counts]
    total = int(counts[0].sum())
    caption = (
        f"{total:,} codes of each codebook. Left: how frequent each code is, from the most frequent on; right: the "
        "share of the most frequent ones together. A dot: they hold 80 % of all."
    )
    figure, (axes, summed) = _figure(2, title, caption, xlabel="codes, the most frequent first")
    for number, (name, book, n) in enumerate(zip(names, counts, holding)):
        shares = np.sort(book)[::-1] / max(book.sum(), 1)
        ranks, color = np.arange(1, len(book) + 1), colour_of(number)
        label = f"{name}: {n} of {len(book)} hold 80 %, {used[number]} in use"
        axes.plot(ranks, np.where(shares > 0, shares, np.nan), color=color, linewidth=1.6, label=label)
        summed.plot([0, *ranks], [0, *shares.cumsum()], color=color, linewidth=1.6)
        if n:
            axes.plot(n, shares[n - 1], "o", color=color, markersize=5)
            summed.plot(n, shares[:n].sum(), "o", color=color, markersize=5)
    axes.set_ylabel("frequency")
    _log(axes, "y")
    summed.set_ylabel("share of all codes")
    summed.axhline(SHARE, color=FADED, linestyle="--", linewidth=1)
    summed.set_ylim(0, 1.03)
    largest = max(len(book) for book in counts)
    if largest > 1000:
        for panel in (axes, summed):
            _log(panel, "x")
            panel.set_xlim(left=1)
    _legend(axes, most=8)
    numbers = {f"codes_for_80_percent_{i}": n for i, n in enumerate(holding, start=1)}
    numbers |= {f"codes_in_use_{i}": n for i, n in enumerate(used, start=1)}
    return _drawing("code_frequencies", figure, caption, numbers)


def usage(history, title=""):
    """Usage, perplexity and dead fraction over the steps of a training, a line a codebook or layer.

    Args:
        history: rows (step, name, value) as a metrics file has them, with names like "val/usage_1"; others are left
            out.
    Raises:
        ValueError: none of them.
    """
    kinds = {
        "usage": "share of codes in use",
        "perplexity": "codes in use",
        "dead_fraction": "share of codes never used",
    }
    lines = {kind: defaultdict(list) for kind in kinds}
    for step, name, value in history:
        split, _, quantity = name.partition("/")
        kind, _, number = quantity.rpartition("_")
        if kind in lines and number.isdigit() and split in ("train", "val"):
            lines[kind][int(number), split].append((step, value))
    lines = {kind: dict(sorted(found.items())) for kind, found in lines.items() if found}
    if not lines:
        raise ValueError("usage: expected figures of codebooks over the steps, found none")
    caption = "Of the codes that an epoch or a validation chose, counted for each codebook or layer."
    caption += not_finite(*(np.array(points)[:, 1] for found in lines.values() for points in found.values()))
    figure, panels = _figure(len(lines), title, caption, xlabel="step", width=4.4, headed=True)
    for axes, (kind, found) in zip(panels, lines.items()):
        axes.set_title(kind.replace("_", " "), fontsize=10)
        axes.set_ylabel(kinds[kind])
        first = min(number for number, _ in found)
        for (number, split), points in found.items():
            style = {"color": colour_of(number - first), "linestyle": "--" if split == "train" else "-"}
            _line(axes, *zip(*points), label=f"{number}, {'training' if split == 'train' else 'held out'}", **style)
        axes.set_ylim(bottom=0, top=1.03 if kind != "perplexity" else None)
        _whole(axes.xaxis)
    _legend(panels[0], most=12, title="codebook")
    last = {f"{kind}_{number}": points[-1][1] for kind, found in lines.items() for (number, _), points in found.items()}
    return _drawing("usage", figure, caption, last)


def latents(mean, std, kl=None, title=""):
    """Statistics of continuous latents, channel by channel.

    Args:
        mean, std: (D,) over clips, frames and positions.
        kl: (D,) nats a position, of a posterior from N(0, 1); None where there is no posterior.
    """
    mean, std = as_array(mean), as_array(std)
    caption = (
        f"{len(mean)} channels, over clips, frames and positions. A prior over latents expects a spread of about 1."
    )
    if kl is not None:
        caption += " A channel without KL says nothing of the frame."
    caption += not_finite(mean, std, kl)
    figure, panels = _figure(2 if kl is None else 3, title, caption, xlabel="channel", width=4.6)
    channels = np.arange(1, len(mean) + 1)
    axes = panels[0]
    axes.axhline(0, color=FAINT, linewidth=1)
    axes.errorbar(channels, mean, std, fmt="o", color=colour_of(0), ecolor="#9db7da", markersize=3, elinewidth=1.4)
    axes.set_ylabel("mean, and one standard deviation")
    _bars(panels[1], channels, std, colour_of(0))
    panels[1].axhline(1, color=FADED, linestyle="--", linewidth=1)
    panels[1].set_ylabel("standard deviation")
    numbers = {"spread": float(np.sqrt(np.nanmean(np.square(std))))}
    if kl is not None:
        _bars(panels[2], channels, as_array(kl), colour_of(1))
        panels[2].set_ylabel("KL from N(0, 1), nats a position")
        numbers["kl"] = float(np.nansum(as_array(kl)))
    for axes in panels:
        _whole(axes.xaxis)
        axes.set_xlim(0.3, len(mean) + 0.7)
    return _drawing("latents", figure, caption, numbers)


# What priors say of themselves ---------------------------------------------------------------------------------------


def losses(bits, unigram, sizes, n_context, title="", noun="codebook"):
    """What a code costs a prior: of each codebook or layer, in each predicted frame, and at each position.

    Args:
        bits: (T, h, w, n), -log2 of the likelihood of each code, mean over clips.
        unigram: (n,) bits, the entropy of each codebook's codes: what one pays who knows their frequencies alone.
        sizes: (n,) of the codebooks, of which log2 is what one pays who knows nothing.
        n_context: given frames.
    """
    bits, unigram = as_array(bits).astype(np.float64), as_array(unigram).astype(np.float64)
    n_frames, height, width, n = bits.shape
    per_book = bits.mean((0, 1, 2))
    caption = (
        f"Bits that the prior needs for a code, given {n_context} frames. Dashed: the entropy of the codes' "
        "frequencies; dotted: of codes that are all alike. The lower below the dashed line, the more the prior knows."
    )
    caption += not_finite(bits, unigram)
    aspect = width / height
    figure, (books, frames, places) = _figure(3, title, caption, width=4.6, headed=True)
    numbers = np.arange(1, n + 1)
    for i, (value, known, size) in enumerate(zip(per_book, unigram, sizes)):
        books.bar(numbers[i], np.nan_to_num(value, posinf=0, neginf=0), color=colour_of(i), width=0.6)
        books.hlines(known, numbers[i] - 0.4, numbers[i] + 0.4, color=INK, linestyle="--", linewidth=1.4)
        books.hlines(math.log2(size), numbers[i] - 0.4, numbers[i] + 0.4, color=FADED, linestyle=":", linewidth=1.4)
        place = (numbers[i], np.nan_to_num(value, posinf=0, neginf=0) / 2)
        if n <= MOST_NUMBERED:
            books.annotate(f"{value:.2f}", place, ha="center", va="center", fontsize=8, color="white")
    books.set(xlabel=noun, ylabel="bits a code ↓", xlim=(0.3, n + 0.7))
    if n <= MOST_NUMBERED:
        books.set_xticks(numbers)
    for i, curve in enumerate(bits.mean((1, 2)).T):
        _line(frames, range(1, n_frames + 1), curve, color=colour_of(i), label=f"{noun} {i + 1}")
        frames.axhline(unigram[i], color=colour_of(i), linestyle="--", linewidth=1)
    frames.set(xlabel="predicted frame", ylabel="bits a code ↓")
    frames.set_ylim(bottom=0)
    _whole(frames.xaxis)
    _legend(frames, most=8)
    box = places.get_position()
    room = box.width * 0.8, box.height  # of a colour bar the rest
    inches = figure.get_size_inches()
    scale = min(room[0] * inches[0] / aspect, room[1] * inches[1])
    size = scale * aspect / inches[0], scale / inches[1]
    places.set_position((box.x0, box.y0 + (room[1] - size[1]) / 2, *size))
    where = bits.mean((0, 3))
    image = _map(places, where, 0, max(np.nanmax(where[np.isfinite(where)], initial=0), 1e-6))
    places.set_title("at each position", fontsize=9)
    bar = figure.add_axes((box.x0 + size[0] + 0.15 / inches[0], box.y0, 0.14 / inches[0], box.height))
    _colour_bar(figure, bar, image, "bits a code")
    found = {f"bits_{i}": float(value) for i, value in enumerate(per_book, start=1)}
    return _drawing("losses", figure, caption, found | {f"entropy_{i}": float(u) for i, u in enumerate(unigram, 1)})


def kl_groups(kl, n_context, active=0.01, title=""):
    """KL of the latent groups of a recurrent VAE, and which of their numbers are active.

    Args:
        kl: (T - 1, G, group_dim) nats, of each frame after the first and each number of a group, mean over clips.
        n_context: given frames of the T.
        active: nats from which a number is called active.
    """
    kl = as_array(kl).astype(np.float64)
    n_groups, group_dim = kl.shape[1:]
    units = kl.mean(0)
    counts = (units >= active).sum(1)
    caption = (
        f"How much z tells that its prior did not know. A number below {active:g} nats (dashed) says nothing; a group "
        "without an active one has collapsed."
    )
    caption += not_finite(kl)
    figure, (groups, each, frames) = _figure(3, title, caption, width=4.6)
    for j in range(n_groups):
        total = units[j].sum()
        groups.bar(j + 1, np.nan_to_num(total, posinf=0, neginf=0), color=colour_of(j), width=0.6)
        text = f"{total:.2f}\n{counts[j]} of {group_dim} active"
        groups.annotate(text, (j + 1, np.nan_to_num(total)), ha="center", va="bottom", fontsize=8, color=INK)
        sizes = np.sort(units[j])[::-1]
        each.plot(range(1, group_dim + 1), np.where(sizes > 0, sizes, np.nan), "o-", color=colour_of(j), markersize=4)
        sums = kl[:, j].sum(1)
        _line(frames, range(2 - n_context, 2 - n_context + len(kl)), sums, color=colour_of(j), label=f"group {j + 1}")
    groups.set(xlabel="group of z", ylabel="KL, nats a frame", xlim=(0.3, n_groups + 0.7))
    groups.set_xticks(range(1, n_groups + 1))
    groups.margins(y=0.25)
    each.axhline(active, color=FADED, linestyle="--", linewidth=1)
    each.set(xlabel="numbers of the group, the largest first", ylabel="KL, nats a frame")
    _log(each, "y")
    _whole(each.xaxis)
    frames.set(xlabel="frame (0: the last given one)", ylabel="KL, nats")
    frames.set_ylim(bottom=0)
    if n_context > 1:
        frames.axvspan(1.5 - n_context, 0.5, color=CONTEXT, alpha=0.12, linewidth=0)
    _whole(frames.xaxis)
    _legend(frames)
    found = {f"active_units_group_{j}": int(count) for j, count in enumerate(counts, start=1)}
    return _drawing("kl_groups", figure, caption, found | {"kl": float(units.sum())})


def motion_spread(spread, change, times, title=""):
    """How far motion features of several samples are apart over time, beside how far they have moved: STDiff.

    Args:
        spread: (B, T), standard deviation over the samples, root mean square over the feature.
        change: (B, T), of the samples' mean from the start, root mean square over the feature.
        times: (T,) frame intervals after the context.
    """
    spread, change = as_array(spread), as_array(change)
    caption = (
        "Bands: from the least to the largest of the clips. Without a spread the motion is the same in all samples, "
        "and futures differ by their frames' noise alone."
    )
    caption += not_finite(spread, change)
    figure, (axes,) = _figure(1, title, caption, width=6.5, xlabel="time, frames after the context")
    for number, (name, values) in enumerate(
        {"spread over the samples": spread, "change since the context": change}.items()
    ):
        _line(axes, times, values.mean(0), color=colour_of(number), label=name)
        axes.fill_between(times, values.min(0), values.max(0), color=colour_of(number), alpha=0.15, linewidth=0)
    axes.set_ylabel("motion feature, root mean square")
    axes.set_ylim(bottom=0)
    _legend(axes)
    return _drawing(
        "motion", figure, caption, {"spread": float(spread[:, -1].mean()), "change": float(change[:, -1].mean())}
    )


# Training ------------------------------------------------------------------------------------------------------------


def training_curves(history, title="", name="training"):
    """The curves of a training: one panel a quantity, training and validation together, and the learning rate.

    What spans orders of magnitude is drawn on a logarithmic scale.

    Args:
        history: rows (step, name, value) as a metrics file has them.
        name: of the figure.
    Raises:
        ValueError: nothing that has a curve.
    """
    lines = defaultdict(lambda: defaultdict(list))
    n_bad = 0
    for step, logged, value in history:
        split, _, quantity = logged.partition("/")
        if quantity == "lr":
            lines["learning rate"][split].append((step, value))
        elif split in ("train", "val"):
            n_bad += not math.isfinite(value)
            if math.isfinite(value):
                lines[quantity][split].append((step, value))
    # What the model reports, its loss first; not the gradient norm, nor figures of single codebooks.
    quantities = sorted(q for q in lines if q not in ("loss", "learning rate", "grad_norm") and not q[-1].isdigit())
    quantities = [q for q in ("loss", *quantities, "learning rate") if q in lines]
    if quantities in ([], ["learning rate"]):
        raise ValueError("curves of the training: expected figures of a model, found none")
    caption = "Training, and validation of the averaged weights." + (n_bad > 0) * f" {n_bad} values are not finite."
    figure, panels = _figure(len(quantities), title, caption, columns=3, xlabel="step", headed=True, left=FOR_ANY_TICKS)
    for axes, quantity in zip(panels, quantities):
        unit = next((unit for end, unit in UNITS.items() if quantity == end or quantity.endswith(f"_{end}")), None)
        axes.set_title(quantity.replace("_", " "), fontsize=10)
        axes.set_ylabel(unit)
        for number, (split, points) in enumerate(sorted(lines[quantity].items())):
            _line(axes, *zip(*points), label=split, color=colour_of(number))
        values = [value for points in lines[quantity].values() for _, value in points]
        if quantity != "learning rate" and min(values) > 0 and max(values) > WIDE * min(values):
            _log(axes, "y")
        _whole(axes.xaxis)
        _legend(axes)
    return _drawing(name, figure, caption)


# How they are drawn --------------------------------------------------------------------------------------------------


def _colours(panels):
    """name of a panel -> label -> what it shows -> label -> colour, the same in all panels."""
    labels = dict.fromkeys(label for named in panels.values() for label in named)
    return {label: colour_of(number) for number, label in enumerate(labels)}


def _text(label):
    """As matplotlib shows it: names may hold bytes that are no text, and dollars, which are no formulas."""
    return cut_name(printable(label), LONGEST_LABEL).replace("$", r"\$")


def _figure(n_panels, title="", caption="", columns=None, width=PANEL[0], headed=False, left=AROUND["left"], **labels):
    """-> (Figure, its panels); all places are given: to measure texts takes longer than a short training."""
    columns = min(n_panels, columns or n_panels)
    rows = math.ceil(n_panels / columns)
    height = PANEL[1] + HEADED * headed
    figure, size, head = _page(width * columns, height * rows, title, caption)
    inner = width - left - AROUND["right"], PANEL[1] - AROUND["bottom"] - AROUND["top"]
    panels = []
    for index in range(n_panels):
        row, column = divmod(index, columns)
        start = column * width + left
        bottom = size[1] - head - (row + 1) * height + AROUND["bottom"]
        box = (start / size[0], bottom / size[1], inner[0] / size[0], inner[1] / size[1])
        axes = _styled(figure.add_axes(box, **labels))
        axes.xaxis.set_label_coords(0.5, (0.27 - AROUND["bottom"]) / inner[1])
        axes.yaxis.set_label_coords((0.25 - left) / inner[0], 0.5)
        panels.append(axes)
    return figure, panels


def _page(width, height, title, caption):
    """An empty Figure with its words -> (Figure, (width, height), height of the words), inches."""
    from matplotlib.figure import Figure  # not pyplot: no window system is asked for

    lines = wrapped(caption, (width - 0.3) * DPI)
    head = TITLE * bool(title) + WORDS * len(lines) + 0.08 * bool(title or lines)
    figure = Figure(figsize=(width, height + head), dpi=DPI, facecolor="white")
    size = (width, height + head)
    if title:
        place = {"x": 0.12 / width, "y": 1 - TITLE / 2 / size[1], "ha": "left", "va": "center"}
        figure.suptitle(printable(title), **place, fontsize=10.5, fontweight="bold", color=INK, parse_math=False)
    for number, line in enumerate(lines):
        y = 1 - (TITLE * bool(title) + 0.08 * (not title) + WORDS * (number + 0.4)) / size[1]
        figure.text(0.12 / width, y, line, va="center", fontsize=8.5, color=FADED, parse_math=False)
    return figure, size, head


def _styled(axes):
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(FADED)
    axes.tick_params(colors=FADED, labelcolor=INK, labelsize=8.5, length=3)
    axes.grid(True, color=FAINT, linewidth=0.7)
    axes.set_axisbelow(True)
    for label in (axes.xaxis.label, axes.yaxis.label):
        label.set(fontsize=9, color=INK)
    axes.title.set(fontsize=10, color=INK)
    axes.set_title("", y=1)  # where it stands anyway; else every label of the ticks is measured to find that out
    return axes


def _log(axes, which):
    """A logarithmic scale for what is drawn, with plain numbers: formulas take long to set."""
    from matplotlib.ticker import FuncFormatter, NullFormatter

    getattr(axes, f"set_{which}scale")("log")
    axis, (low, high) = getattr(axes, f"{which}axis"), getattr(axes, f"get_{which}lim")()
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    few = high < 30 * low  # decades have too few numbers
    between = FuncFormatter(lambda value, _: f"{value:g}" if f"{value:e}"[0] in "25" else "")
    axis.set_minor_formatter(between if few else NullFormatter())
    axis.set_tick_params(which="minor", labelsize=8.5, labelcolor=INK, color=FADED)


def _whole(axis):
    from matplotlib.ticker import MaxNLocator

    axis.set_major_locator(MaxNLocator(5, integer=True))


def _legend(axes, most=10, title=None):
    """The lines' names; of more than ``most`` the first ones."""
    handles, labels = axes.get_legend_handles_labels()
    if not handles:
        return
    if len(handles) > most:
        labels = [*labels[: most - 1], f"... and {len(labels) - most + 1} more"]
        handles = handles[:most]
    many = sum(len(line.get_xdata()) for line in axes.lines) > 2000  # among which to look for room takes long
    where = "upper right" if many else "best"
    legend = axes.legend(
        handles, labels, loc=where, fontsize=8, framealpha=0.85, edgecolor="none", labelcolor=INK, title=title
    )
    legend.get_title().set_fontsize(8)


def _line(axes, x, y, **style):
    """A line, with marks where values are few; where one is not finite, a magenta cross at the edge."""
    x, y = np.asarray(x, dtype=np.float64), np.asarray(y, dtype=np.float64)
    bad = ~np.isfinite(y)
    marker = "." if len(x) < MOST_MARKED else None
    axes.plot(x, np.where(bad, np.nan, y), marker=marker, linewidth=1.6, **style)
    _mark(axes, x[bad])


def _mark(axes, x):
    """Where values are not finite, along the lower edge."""
    if len(x):
        place = {"transform": axes.get_xaxis_transform(), "clip_on": False, "zorder": 5}
        axes.plot(x, np.zeros(len(x)), "x", color=_hex(BAD[0]), markersize=6, markeredgewidth=1.8, **place)


def _bars(axes, x, values, color):
    bad = ~np.isfinite(values)
    axes.bar(x, np.where(bad, 0, values), color=color, width=0.8)
    _mark(axes, np.asarray(x)[bad])


def _curve(axes, entry, inverse=False, **style):
    def drawn(values):
        values = np.asarray(values, dtype=np.float64)
        return 1 / np.where(values > 0, values, np.nan) if inverse else values

    frames = np.arange(1, len(entry["per_frame"]) + 1)
    values = drawn(entry["per_frame"])
    axes.plot(frames, np.where(np.isfinite(values), values, np.nan), marker=".", linewidth=1.6, **style)
    _mark(axes, frames[~np.isfinite(np.asarray(entry["per_frame"], dtype=np.float64))])
    if entry.get("per_frame_ci95"):
        low, high = np.transpose(entry["per_frame_ci95"])
        axes.fill_between(frames, drawn(low), drawn(high), color=style["color"], alpha=0.2, linewidth=0)


def _map_grid(n_rows, n_columns, side, title, caption):
    """Panels of ``side`` (width, height) inches without axes, and one for a colour bar -> (Figure, [[Axes]], Axes)."""
    left, gap, top, bar, right = 0.45, 0.12, 0.32, 0.16, 0.75
    width = left + n_columns * (side[0] + gap) + bar + right
    height = top + n_rows * (side[1] + gap) + 0.1
    figure, size, head = _page(max(width, 5.2), height, title, caption)
    grid = []
    for row in range(n_rows):
        bottom = size[1] - head - top - (row + 1) * side[1] - row * gap
        boxes = [(left + column * (side[0] + gap), bottom, *side) for column in range(n_columns)]
        grid.append([figure.add_axes(_share(box, size)) for box in boxes])
    low = size[1] - head - top - n_rows * side[1] - (n_rows - 1) * gap
    box = (left + n_columns * (side[0] + gap), low, bar, n_rows * side[1] + (n_rows - 1) * gap)
    return figure, grid, figure.add_axes(_share(box, size))


def _share(box, size):
    return (box[0] / size[0], box[1] / size[1], box[2] / size[0], box[3] / size[1])


def _map(axes, values, low, high):
    """Numbers (H, W) as colours; what is not finite is left out, over a magenta hatch."""
    from matplotlib.colors import LinearSegmentedColormap

    axes.set(xticks=[], yticks=[])
    axes.title.set_color(INK)
    axes.spines[:].set_color(FADED)
    axes.set_facecolor("white")
    axes.patch.set(hatch="xxxx", edgecolor=_hex(BAD[0]), linewidth=0)
    colours = LinearSegmentedColormap.from_list("amount", AMOUNT)
    shown = np.ma.masked_invalid(values) if not np.isfinite(values).all() else values
    return axes.imshow(shown, cmap=colours, vmin=low, vmax=high, interpolation="nearest", aspect="auto")


def _colour_bar(figure, axes, image, label):
    bar = figure.colorbar(image, cax=axes)
    bar.set_label(label, fontsize=9, color=INK)
    bar.outline.set_visible(False)
    axes.tick_params(colors=FADED, labelcolor=INK, labelsize=8.5, length=3)


def _hex(colour):
    return "#" + "".join(f"{value:02x}" for value in colour)


def _drawing(name, figure, caption, numbers=None):
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # draws without a display

    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    picture = Image.fromarray(np.asarray(canvas.buffer_rgba())).convert("RGB")
    return Drawing(name, caption, picture, numbers=plain(numbers or {}), chart=figure)
