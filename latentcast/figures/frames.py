"""Figures that show frames, and maps of what lies behind them. Each returns a Drawing.

Shape letters: N clips, T frames, S samples. Frames are (..., C, H, W) in [-1, 1], shown by ``shown_channels``.
"""

import numpy as np
import torch

from .sheets import (
    BORDER,
    GIVEN,
    PREDICTED,
    TRUE,
    Row,
    as_tiles,
    bordered,
    fitted,
    frame_names,
    labelled_sheet,
    labelled_videos,
    picked,
)
from .style import CHANGED, SAME, Drawing, Scale, as_array, code_colours, in_frames, not_finite, plain, stacked

MOST = 12  # frames of a clip on a sheet
MOST_BOOKS = 8  # codebooks on a sheet
MARGIN = 10  # pixels around a sheet
LEVELS = 127.5  # 8-bit levels a unit of frames in [-1, 1]
PLAIN = in_frames("#c9ced6")  # the edge of what is neither given nor predicted nor true
OF_FRAMES = [(GIVEN, "given"), (PREDICTED, "predicted"), (TRUE, "true")]
HATCH = ("hatch", "not finite")


def reconstructions(truth, reconstruction, names=None, psnr=None, title=""):
    """Truth, reconstruction and a map of the error, below each other.

    Args:
        truth, reconstruction: (N, T, C, H, W); clips of a single frame stand beside each other.
        names: of the N clips.
        psnr: (N, T) dB, to be written below the reconstructions.
    """
    truth, reconstruction = (torch.as_tensor(x).detach().float().cpu() for x in (truth, reconstruction))
    said = not_finite(truth, reconstruction)
    names, what = names or _numbered("clip", len(truth)), "frame"
    if truth.shape[1] == 1:
        truth, reconstruction, names, what = truth.transpose(0, 1), reconstruction.transpose(0, 1), [""], "clip"
        psnr = None if psnr is None else as_array(psnr).T
    errors = (reconstruction - truth).abs().mean(2) * LEVELS
    scale = Scale.of("absolute error, of 255", errors, share=0.998)
    chosen = picked(truth.shape[1], MOST)
    rows = []
    for i, name in enumerate(names):
        notes = () if psnr is None else tuple(f"{value:.1f} dB" for value in as_array(psnr)[i][chosen])
        rows.append(_row(f"{name}\ntruth", truth[i, chosen], TRUE, begins=True))
        rows.append(_row("reconstruction", reconstruction[i, chosen], PLAIN, notes=notes))
        rows.append(_maps_row("error", scale.paint(errors[i, chosen]), rows[-1].frames))
    numbers = {"error": float(errors[errors.isfinite()].mean()) if errors.isfinite().any() else float("nan")}
    if psnr is not None:
        numbers["psnr"] = float(np.mean(as_array(psnr)))
    columns = [f"{what} {number + 1}" for number in chosen.tolist()]
    caption = "Each frame as it is and as the tokenizer gives it back; the darker the map, the larger the error." + said
    return _sheet("reconstructions", rows, columns, title, caption, [scale], said, numbers)


def code_maps(clips, title="", what="frame"):
    """The codes of frames as maps in indexed colour, a row a codebook: LVT, Figures 6 to 11.

    Args:
        clips: list of (name, kind, frames (T, C, H, W), codes (T, h, w, n), n_given): the frames above their codes; the
            first ``n_given`` of them are given, the rest predicted; None: all are true. The kind, "truth" say, stands
            below the name.
        what: a column is: "clip" where clips of a single frame stand beside each other as if they were frames.
    """
    caption = "Each code has a colour of its own, the same in every frame: what keeps its colour keeps its code."
    return _codes("code_maps", clips, title, caption, _painted_codes, what)


def change_masks(clips, title=""):
    """Where codes are others than in the frame before, and in which share of the places: LVT, Figures 6 to 11.

    Args:
        clips: as of ``code_maps``.
    """
    caption = "Yellow: the code is another than in the frame before. Below each frame the share of the codes that are."
    return _codes("change_masks", clips, title, caption, _painted_changes)


def changes(codes):
    """Codes (T, h, w, n) -> (T, h, w, n) bool: which are others than in the frame before; none of the first."""
    codes = as_array(codes)
    return np.concatenate([np.zeros_like(codes[:1], bool), codes[1:] != codes[:-1]])


def _codes(name, clips, title, caption, paint, what="frame"):
    givens = [n for *_, n in clips if n is not None]
    rows, numbers, longest = [], {}, max(len(codes) for *_, codes, _ in clips)
    chosen = picked(longest, MOST, givens[0] - 1 if givens else None)
    said, legend = not_finite(*(frames for _, _, frames, _, _ in clips)), OF_FRAMES if givens else []
    for label, kind, frames, codes, n_given in clips:
        frames, codes = torch.as_tensor(frames).cpu(), as_array(codes)
        places = chosen[chosen < len(frames)]
        tiles = fitted(frames[places])
        given = [GIVEN if n_given is not None and i < n_given else PREDICTED for i in places.tolist()]
        tiles = _edged(tiles, [TRUE] * len(places) if n_given is None else given)
        rows.append(Row(f"{label}\n{kind}".strip("\n"), tiles, (), True))
        rate = float(changes(codes)[1:].mean()) if len(codes) > 1 else float("nan")
        numbers[f"change_rate {label} {kind}".strip()] = rate
        for k in range(min(codes.shape[-1], MOST_BOOKS)):
            painted, notes, said_of_row = paint(codes[..., k], places.numpy())
            book = f"codebook {k + 1}" if codes.shape[-1] > 1 else "codes"
            rows.append(_maps_row(f"{book}\n{said_of_row}", painted, tiles, notes))
    if codes.shape[-1] > MOST_BOOKS:
        said += f" The first {MOST_BOOKS} of {codes.shape[-1]} codebooks."
    columns = [f"{what} {i + 1}" for i in chosen.tolist()]
    return _sheet(name, rows, columns, title, caption + said, legend, said, numbers)


def _painted_codes(codes, places):
    used = len(np.unique(codes))
    return code_colours(int(codes.max()) + 1)[codes[places]], (), f"{used} codes in use"


def _painted_changes(codes, places):
    changed = changes(codes[..., None])[..., 0]
    painted = np.where(changed[..., None], np.array(CHANGED, np.uint8), np.array(SAME, np.uint8))[places]
    painted[places == 0] = (205, 209, 216)  # nothing to compare the first frame with
    notes = tuple("–" if place == 0 else f"{100 * changed[place].mean():.0f} %" for place in places.tolist())
    rate = f"{100 * changed[1:].mean():.1f} % change" if len(codes) > 1 else "no frame before"
    return painted, notes, rate


def layers(truth, partial, names=None, notes=None, title="", bits=None, n_given=None):
    """What each layer of a hierarchical tokenizer adds: decoded from the first, from the first two, and so on.

    Args:
        truth: (N, T, C, H, W). partial: (N, L, T, C, H, W), the last from all layers; of a prediction the given frames
            as they are.
        notes: (N, L, T) dB, PSNR of each.
        bits: (L,) bits a code of each layer.
        n_given: for each of the N how many of the T frames are given, where ``partial`` is a prediction, else None.
    """
    truth, partial = (torch.as_tensor(x).detach().float().cpu() for x in (truth, partial))
    said = not_finite(truth, partial)
    names = names or _numbered("clip", len(truth))
    rows, givens = [], n_given or [None] * len(names)
    chosen = picked(truth.shape[1], MOST, next((n - 1 for n in givens if n), None))
    for i, (name, n_given) in enumerate(zip(names, givens)):
        rows.append(_row(f"{name}\ntruth", truth[i, chosen], _edges(chosen, n_given, TRUE), begins=True))
        for n in range(1, partial.shape[1] + 1):
            first = "layer 1" if n == 1 else f"layers 1 to {n}"
            cost = "" if bits is None else f"\n{sum(bits[:n]):.2f} bits a place"
            written = () if notes is None else tuple(f"{x:.1f} dB" for x in as_array(notes)[i, n - 1][chosen])
            frames = partial[i, n - 1, chosen]
            rows.append(_row(first + cost, frames, _edges(chosen, n_given, PLAIN, PREDICTED), notes=written))
    numbers = {} if bits is None else {f"bits_{n}": float(b) for n, b in enumerate(bits, start=1)}
    if notes is not None:
        numbers |= {f"psnr_{n}": float(x) for n, x in enumerate(as_array(notes).mean((0, 2)), start=1)}
    caption = "Decoded from the first layer of the codes alone, from the first two, and so on."
    columns = [f"frame {i + 1}" for i in chosen.tolist()]
    legend = OF_FRAMES if any(givens) else []
    return _sheet("layers", rows, columns, title, caption + said, legend, said, numbers)


def decoding(truth, steps, known, names=None, title=""):
    """A frame that is drawn in steps: after each step what is known, and what the rest would be.

    Args:
        truth: (N, C, H, W). steps: (N, n_steps, C, H, W), decoded, codes not yet known as they were drawn last.
        known: (N, n_steps, h, w) in [0, 1], the share of its codes that are known of each position.
    """
    truth, steps = (torch.as_tensor(x).detach().float().cpu() for x in (truth, steps))
    said = not_finite(truth, steps)
    known, rows = torch.as_tensor(known).float().cpu(), []
    chosen = picked(steps.shape[1], MOST)
    for i, name in enumerate(names or _numbered("clip", len(truth))):
        row = _row(name, torch.cat([truth[i, None], steps[i, chosen]]), [TRUE] + [PREDICTED] * len(chosen), begins=True)
        maps = torch.cat([torch.ones_like(known[i, :1]), known[i, chosen]])
        painted = (maps * 255).byte()[..., None].expand(-1, -1, -1, 3).numpy()
        shares = ("", *(f"{share:.0%}" for share in known[i, chosen].mean((1, 2)).tolist()))
        rows += [row, _maps_row("known", painted, row.frames, shares, blank=1)]
    caption = (
        "The first predicted frame after each step; below it, what is known of its codes (white: all of a position)."
    )
    columns = ["truth", *(f"step {i + 1}" for i in chosen.tolist())]
    return _sheet("decoding", rows, columns, title, caption + said, OF_FRAMES, said)


def futures(context, samples, truth=None, best=None, names=None, fps=None, title="", scores=None):
    """Predicted futures, as a sheet and as a video: the truth, the best sample, one at random, their mean and spread.

    Args:
        context: (N, n, C, H, W). samples: (N, S, T, C, H, W). truth: (N, T, C, H, W), or None where it is not known.
        best: (N,) which of the samples is nearest to the truth; None without a truth.
        scores: (N, S) of the samples, dB, to be written beside the best and the random one.
        fps: rate of the video.
    """
    context, samples = (torch.as_tensor(x).detach().float().cpu() for x in (context, samples))
    truth = None if truth is None else torch.as_tensor(truth).detach().float().cpu()
    said = not_finite(context, samples, truth)
    (n_clips, n_given), n_samples, n_frames = context.shape[:2], samples.shape[1], samples.shape[2]
    spread = samples.std(1, correction=0).mean(2) * LEVELS  # (N, T, H, W)
    scale = Scale.of("standard deviation of a pixel over the samples, of 255", spread, share=0.998)
    names = names or _numbered("clip", n_clips)
    edges = [GIVEN] * n_given + [PREDICTED] * n_frames
    shown, clips = [], []  # of the sheet; of the video
    for i in range(n_clips):
        whole = {}
        if truth is not None:
            whole["truth"] = ("", torch.cat([context[i], truth[i]]), [GIVEN] * n_given + [TRUE] * n_frames)
        picks = [("sample 1", 0)] if n_samples == 1 else [("random", 0)]
        if best is not None and n_samples > 1:
            picks.insert(0, (f"best of {n_samples}", int(best[i])))
        for label, s in picks:
            score = "" if scores is None else f"\n{as_array(scores)[i, s]:.1f} dB"
            whole[label] = (score, torch.cat([context[i], samples[i, s]]), edges)
        if n_samples > 1:
            whole["mean"] = ("", torch.cat([context[i], samples[i].mean(0)]), edges)
        tiles = {label: (said_, _edged(fitted(frames), e)) for label, (said_, frames, e) in whole.items()}
        if n_samples > 1:
            size = next(iter(tiles.values()))[1].shape[2:]
            maps = as_tiles(scale.paint(spread[i]), [side - 2 * BORDER for side in size])
            blank = torch.full((n_given, 3, *maps.shape[2:]), 255, dtype=torch.uint8)
            maps = _edged(torch.cat([blank, maps]), [(1, 1, 1)] * n_given + [PLAIN] * n_frames)
            tiles["spread"] = ("", maps)
        for number, (label, (score, frames)) in enumerate(tiles.items()):
            shown.append((f"{names[i]}\n{label}" if number == 0 else f"{label}{score}", frames, number == 0))
        clips.append(
            [(names[i] if number == 0 else label, frames) for number, (label, (_, frames)) in enumerate(tiles.items())]
        )
    chosen = picked(n_given + n_frames, MOST, n_given - 1)
    headings = frame_names(n_given, n_frames)
    rows = [Row(name, frames[chosen], (), begins) for name, frames, begins in shown]
    legend = [*OF_FRAMES[: 3 if truth is not None else 2], *([scale] if n_samples > 1 else [])]
    caption = f"{n_samples} future{'s' * (n_samples > 1)} of each context. Frame 0 is the last given one."
    if n_samples > 1:
        caption += " The darker the last row, the more the samples differ there."
    numbers = {"spread": float(spread.mean())}
    if scores is not None:
        numbers |= {"psnr_best": float(as_array(scores).max(1).mean()), "psnr_mean": float(as_array(scores).mean())}
    drawing = _sheet("futures", rows, [headings[i] for i in chosen], title, caption + said, legend, said, numbers)
    titles = [f"{title}: {name}" if title else name for name in frame_names(n_given, n_frames, fps)]
    video = labelled_videos([cell for clip in clips for cell in clip], titles, 1, len(clips[0]))
    return Drawing(drawing.name, drawing.caption, drawing.picture, video, fps, drawing.numbers)


def residual(context, mu, future, truth=None, names=None, title=""):
    """Residual Video Diffusion frame by frame: mu, the residual that was drawn, and their sum.

    Args:
        context: (N, n, C, H, W). mu, future: (N, T, C, H, W), of one sample. truth: (N, T, C, H, W) or None.
    """
    context, mu, future = (torch.as_tensor(x).detach().float().cpu() for x in (context, mu, future))
    said = not_finite(context, mu, future, truth)
    drawn = (future - mu).mean(2) * LEVELS
    scale = Scale.of("residual, of 255 (red: brighter, blue: darker)", drawn, signed=True, share=0.998)
    names, chosen, n_given = names or _numbered("clip", len(mu)), picked(mu.shape[1], MOST), context.shape[1]
    rows = []
    for i, name in enumerate(names):
        last = context[i, -1:]
        if truth is not None:
            frames = torch.cat([last, torch.as_tensor(truth)[i].cpu()[chosen]])
            rows.append(_row(f"{name}\ntruth", frames, [GIVEN] + [TRUE] * len(chosen), begins=True))
        edges = [GIVEN] + [PREDICTED] * len(chosen)
        rows.append(
            _row(
                f"{name}\nmu" if truth is None else "mu", torch.cat([last, mu[i, chosen]]), edges, begins=truth is None
            )
        )
        painted = scale.paint(drawn[i, chosen])
        painted = np.concatenate([np.full_like(painted[:1], 255), painted])
        rows.append(_maps_row("residual", painted, rows[-1].frames, blank=1))
        rows.append(_row("their sum", torch.cat([last, future[i, chosen]]), edges))
    columns = ["0", *(f"+{i + 1}" for i in chosen.tolist())]
    caption = "mu, the mean around which is drawn; what the diffusion adds to it; and the predicted frame."
    if n_given:
        caption += f" Frame 0 is the last of {n_given} given ones."
    legend = [*OF_FRAMES[: 3 if truth is not None else 2], scale]
    numbers = {"residual": float(drawn.square().mean().sqrt())}
    return _sheet("residual", rows, columns, title, caption + said, legend, said, numbers)


def z_groups(context, varied, truth=None, title=""):
    """What each group of z decides: it alone is drawn, the others are zero: HAF-SVG, Figure 8.

    Args:
        context: (n, C, H, W) of one clip. truth: (T, C, H, W) or None.
        varied: label ("z1 drawn, the rest 0") -> samples (S, T, C, H, W).
    """
    context = torch.as_tensor(context).detach().float().cpu()
    varied = {label: torch.as_tensor(samples).detach().float().cpu() for label, samples in varied.items()}
    said = not_finite(context, truth, *varied.values())
    spreads = {label: samples.std(0, correction=0).mean(1) * LEVELS for label, samples in varied.items()}
    scale = Scale.of("standard deviation of a pixel over the samples, of 255", *spreads.values(), share=0.998)
    n_frames, last = next(iter(varied.values())).shape[1], context[-1:]
    chosen, edges = picked(n_frames, MOST), [GIVEN] + [PREDICTED] * min(n_frames, MOST)
    rows = []
    if truth is not None:
        frames = torch.cat([last, torch.as_tensor(truth).cpu()[chosen]])
        rows.append(_row("truth", frames, [GIVEN] + [TRUE] * len(chosen)))
    for label, samples in varied.items():
        for s, sample in enumerate(samples[:2], start=1):
            frames = torch.cat([last, sample[chosen]])
            rows.append(_row(f"{label}\nsample {s}", frames, edges, begins=s == 1))
        painted = scale.paint(spreads[label][chosen])
        painted = np.concatenate([np.full_like(painted[:1], 255), painted])
        rows.append(_maps_row(f"{label}\nspread of {len(samples)}", painted, rows[-1].frames, blank=1))
    caption = (
        "Samples in which one group of z alone is drawn, and where they differ: what that group decides. Frame 0 is "
        "the last given one."
    )
    legend = [*OF_FRAMES[: 3 if truth is not None else 2], scale]
    numbers = {f"spread {label}": float(spread.mean()) for label, spread in spreads.items()}
    columns = ["0", *(f"+{i + 1}" for i in chosen.tolist())]
    return _sheet("z_groups", rows, columns, title, caption + said, legend, said, numbers)


def motion(chart, context, seeded, truth=None, title=""):
    """``motion_spread``'s chart above futures of one context by seeds of motion and of images: STDiff.

    Args:
        chart: the Drawing.
        context: (n, C, H, W). truth: (T, C, H, W) or None.
        seeded: (M, I, T, C, H, W), futures of M seeds of the motion with I seeds of the images each.
    """
    context, seeded = (torch.as_tensor(x).detach().float().cpu() for x in (context, seeded))
    said, n_frames = not_finite(context, seeded, truth), seeded.shape[2]
    chosen, last = picked(n_frames, MOST), context[-1:]
    rows = []
    if truth is not None:
        frames = torch.cat([last, torch.as_tensor(truth).cpu()[chosen]])
        rows.append(_row("truth", frames, [GIVEN] + [TRUE] * len(chosen)))
    for m, motions in enumerate(seeded, start=1):
        for i, future in enumerate(motions, start=1):
            frames = torch.cat([last, future[chosen]])
            edges = [GIVEN] + [PREDICTED] * len(chosen)
            rows.append(_row(f"motion seed {m}\nimage seed {i}", frames, edges, begins=i == 1))
    by_motion, by_image = (seeded.std(axis, correction=0).mean().item() * LEVELS for axis in (0, 1))
    caption = (
        "Futures with one seed of the motion share where things go, those with one of the images how they are drawn. "
        f"Standard deviation of a pixel, of 255: {by_motion:.2f} over the motions, {by_image:.2f} over the images."
    )
    legend = OF_FRAMES[: 3 if truth is not None else 2]
    columns = ["0", *(f"+{i + 1}" for i in chosen.tolist())]
    sheet = _sheet("motion", rows, columns, title, caption + said, legend, said)
    numbers = chart.numbers | {"over_motions": by_motion, "over_images": by_image}
    captions = f"{chart.caption} {sheet.caption}"
    return Drawing("motion", captions, stacked(chart.picture, sheet.picture), numbers=numbers, chart=chart.chart)


def rollout(chart, context, future, truth=None, horizon=None, title=""):
    """``drift``'s chart above frames of the rollout at even steps.

    Args:
        chart: the Drawing.
        context: (n, C, H, W). future: (T, C, H, W). truth: up to T true frames, or None.
        horizon: predicted frames of a training clip.
    """
    context, future = (torch.as_tensor(x).detach().float().cpu() for x in (context, future))
    chosen, last = picked(len(future), MOST), fitted(context[-1:])
    said, rows = not_finite(context, future, truth), []
    if truth is not None and len(truth):
        tiles = fitted(torch.as_tensor(truth).cpu()[chosen[chosen < len(truth)]])
        lacking = torch.full((len(chosen) - len(tiles), *last.shape[1:]), 255, dtype=torch.uint8)
        edges = [GIVEN] + [TRUE] * len(tiles) + [(1, 1, 1)] * len(lacking)
        rows.append(Row("truth", _edged(torch.cat([last, tiles, lacking]), edges)))
    rows.append(
        Row("prediction", _edged(torch.cat([last, fitted(future[chosen])]), [GIVEN] + [PREDICTED] * len(chosen)))
    )
    columns = ["0", *(f"+{i + 1}" for i in chosen.tolist())]
    sheet = _sheet(
        "drift", rows, columns, title, f"One of the rollouts, trained up to frame +{horizon}.{said}", OF_FRAMES, said
    )
    return Drawing(
        "drift", chart.caption, stacked(chart.picture, sheet.picture), numbers=chart.numbers, chart=chart.chart
    )


def half_steps(context, future, truth=None, names=None, title="", multiplier=2):
    """A prior over continuous time between the frames of the data, the truth above the whole steps.

    Args:
        context: (N, n, C, H, W). future: (N, multiplier * T, C, H, W). truth: (N, T, C, H, W) or None.
    """
    context, future = (torch.as_tensor(x).detach().float().cpu() for x in (context, future))
    said, names = not_finite(context, future, truth), names or _numbered("clip", len(future))
    chosen = torch.arange(min(future.shape[1], MOST * 2))
    rows = []
    for i, name in enumerate(names):
        last = fitted(context[i, -1:])
        if truth is not None:
            tiles = torch.full((len(chosen), *last.shape[1:]), 255, dtype=torch.uint8)
            edges = [(1.0, 1.0, 1.0)] * len(chosen)
            for t, frame in enumerate(fitted(torch.as_tensor(truth)[i].cpu())):
                place = (t + 1) * multiplier - 1
                if place < len(chosen):
                    tiles[place], edges[place] = frame, TRUE
            rows.append(Row(f"{name}\ntruth", _edged(torch.cat([last, tiles]), [GIVEN, *edges]), (), True))
        frames = torch.cat([last, fitted(future[i, chosen])])
        edges = [GIVEN] + [PREDICTED] * len(chosen)
        rows.append(Row("prediction", _edged(frames, edges), (), truth is None))
    columns = ["0", *(f"+{(i + 1) / multiplier:g}" for i in chosen.tolist())]
    caption = f"Predicted at {multiplier} times the rate of the data, whose frames stand above the whole steps."
    return _sheet("half_steps", rows, columns, title, caption + said, OF_FRAMES, said)


# How they are drawn --------------------------------------------------------------------------------------------------


def _numbered(what, n):
    return [f"{what} {number}" for number in range(1, n + 1)]


def _edges(chosen, n_given, true, predicted=TRUE):
    """Colours of frames: all of one, or of ``n_given`` ones green and of the others as predicted."""
    if n_given is None:
        return [true] * len(chosen)
    return [GIVEN if i < n_given else predicted for i in chosen.tolist()]


def _edged(tiles, colours):
    """(N, C, H, W) uint8 -> with an edge of its colour around each."""
    return torch.cat([bordered(tile[None], colour) for tile, colour in zip(tiles, colours)])


def _row(name, frames, colours, notes=(), begins=False):
    tiles = fitted(frames)
    colours = colours if isinstance(colours, list) else [colours] * len(tiles)
    return Row(name.strip("\n"), _edged(tiles, colours), notes, begins)


def _maps_row(name, painted, like, notes=(), blank=0):
    """Maps (N, h, w, 3) uint8 as large as the tiles ``like`` -> Row; the first ``blank`` of them have no edge."""
    tiles = as_tiles(painted, [side - 2 * BORDER for side in like.shape[2:]])
    return Row(name.strip("\n"), _edged(tiles, [(1, 1, 1)] * blank + [PLAIN] * (len(tiles) - blank)), notes)


def _sheet(name, rows, columns, title, caption, legend, said="", numbers=None):
    from PIL import Image

    legend = [*legend, HATCH] if said and "magenta" in said else legend
    sheet = Image.fromarray(
        labelled_sheet(rows, columns, title, 1, caption, legend).movedim(0, -1).contiguous().numpy()
    )
    page = Image.new("RGB", tuple(side + 2 * MARGIN for side in sheet.size), "white")
    page.paste(sheet, (MARGIN, MARGIN))
    return Drawing(name, caption, page, numbers=plain(numbers or {}))
