"""A page in the browser on which a pipeline's futures can be tried out: gradio's, on this machine alone."""

import contextlib
import logging
import math
import os
import shutil
import time
from dataclasses import dataclass
from pathlib import Path

# Before gradio is loaded: nothing is told to anyone.
os.environ |= {"GRADIO_ANALYTICS_ENABLED": "False", "HF_HUB_DISABLE_TELEMETRY": "1", "DO_NOT_TRACK": "1"}

import gradio as gr
import torch

from latentcast.cli import error_line
from latentcast.data.video.futures import Sheet, held, labelled_futures, layout, read_context
from latentcast.data.video.reader import DEFAULT_RATE
from latentcast.data.video.writer import check_video, to_uint8, write_both
from latentcast.figures.sheets import (
    BORDER,
    GIVEN,
    bordered,
    enlarge,
    frame_names,
    labelled_sheet,
    labelled_size,
    rows_of,
    scale_for,
    shown_channels,
)
from latentcast.serving import LOCAL, guards
from latentcast.yaml_text import override_value

logger = logging.getLogger("latentcast")

MOST_FRAMES, MOST_SAMPLES = 512, 64  # that can be predicted
MOST_PIXELS = 1 << 27  # of all futures together, as they are shown
MOST_SEED = 2**53  # as far as a browser counts
GIVEN_SHOWN = 12  # frames of a long context that are shown
TOLD_EVERY = 0.3  # seconds from one word on the progress to the next
WAITING = 8  # jobs that may wait for their turn
HOUR = 3600  # seconds for which files are kept
CSS = """
.gradio-container .main { max-width: 1240px !important; padding: 8px 16px !important; }
#given, #sheet, #video { background: white; }
#given img, #sheet img { object-fit: contain; }
#sheet img { padding-top: 24px; }
#examples .grid-wrap { height: auto; min-height: 0; overflow: visible; }
#examples .grid-container {
  grid-template-columns: repeat(4, minmax(0, 1fr)) !important;
  grid-template-rows: auto !important;
  grid-auto-rows: auto !important;
}
#examples .gallery-item, #examples .thumbnail-item { width: 100%; height: auto; }
#examples img { image-rendering: pixelated; }
#upload .wrap { font-size: 14px; line-height: 1.2; min-height: 0; padding: 0; }
#upload .icon-wrap { width: 18px; margin: 0 0 2px 0; }
footer { display: none !important; }
"""


class Stopped(Exception):
    """Raised in a sampler whose page was closed, or whose Stop was pressed."""


@dataclass(frozen=True)
class Clip:
    """What is to be continued: an example (``frames``, (T, C, H, W) in [-1, 1]) or an uploaded video (``path``)."""

    name: str
    frames: torch.Tensor | None = None
    path: Path | None = None


class Playground:
    """What the page's buttons do.

    Args:
        pipe: a VideoPredictionPipeline, on its device.
        examples: (N, T, C, H, W) in [-1, 1], or None.
        folder: for the files of the latest prediction.
        most_read: frames of an uploaded video that may be decoded.
    Attributes:
        n_context, fps: what is offered at first, and the rate of the examples, frames a second.
        n_predicted: predictions so far.
    """

    def __init__(self, pipe, examples, folder, most_read):
        self.pipe, self.spec, self.folder, self.most_read = pipe, pipe.prior.config.latent_spec, Path(folder), most_read
        self.n_context = pipe.config.n_context or max(5, pipe.prior.min_context)
        self.fps = pipe.config.fps or DEFAULT_RATE
        self.examples = [
            Clip(f"example {i}", frames) for i, frames in enumerate(() if examples is None else examples, 1)
        ]
        self.options = {
            name: option
            for name, option in pipe.prior.sampler_options().items()
            # The video's frames are evenly spaced; the pipeline's own scheduler is the one to use.
            if name != "frame_times" and not (name == "scheduler" and pipe.scheduler is not None)
        }
        self.n_predicted, self._stopped = 0, set()

    def read(self, clip, start, n_context, n_frames=1, multiplier=1):
        """-> context (n_context, C, H, W), truth (T, C, H, W) or None, frames a second; see ``read_context``.

        Raises:
            ValueError: no clip, a number outside its range, or too short a clip. VideoError: see ``read_context``.
        """
        if clip is None:
            raise ValueError("clip: expected an example or a video, found nothing")
        start = whole("first frame", start, 0, self.most_read)
        n_context = whole("given frames", n_context, self.pipe.prior.min_context, self.most_read)
        if clip.frames is None:
            read = {"start": start, "trained_fps": self.pipe.config.fps, "most": self.most_read}
            read |= {"crop": self.pipe.config.crop}
            return read_context(clip.path, self.spec, n_context, n_frames, multiplier, **read)
        end, available = start + n_context, len(clip.frames)
        if available < end:
            raise ValueError(f"{clip.name}: {end} frames are needed, {available} are there")
        n_true = math.ceil(n_frames / multiplier)
        truth = clip.frames[end : end + n_true]
        return clip.frames[start:end], truth if len(truth) == n_true else None, self.fps

    def given(self, clip, start, n_context):
        """What is given, as one picture (H, W, 3) uint8, and in words."""
        context, _, fps = self.read(clip, start, n_context)
        places = torch.linspace(0, len(context) - 1, min(len(context), GIVEN_SHOWN)).round().long()
        names = frame_names(len(context), 1)
        scale = scale_for(self.spec["frame_height"])
        sheet = labelled_sheet([("", bordered(context[places], GIVEN))], [names[place] for place in places], "", scale)
        return to_uint8(sheet, n_dims=3), f"**{clip.name}**, {len(context)} frames at {fps:.3g} a second"

    def predict(self, clip, start, n_context, n_frames, num_samples, seed, options, on_update=None):
        """Predict a clip's futures and write them.

        Args:
            clip: a Clip.
            start: number of the first frame given. n_context: frames given. n_frames: frames to predict.
            num_samples: futures. seed: of all that is drawn.
            options: name -> value of the sampler's options; None: as it is by default.
            on_update: called with (done, total) as the sampler proceeds; what it raises ends it.
        Returns:
            (mp4, GIF, contact sheet) as paths, and what they show in words.
        Raises:
            ValueError: a number or an option outside its range. VideoError: see ``read_context``.
        """
        n_frames = whole("frames to predict", n_frames, 1, MOST_FRAMES)
        num_samples = whole("futures", num_samples, 1, MOST_SAMPLES)
        seed = whole("seed", seed, 0, MOST_SEED)
        options = {name: self._value(name, value) for name, value in options.items()}
        options = {name: value for name, value in options.items() if value is not None}
        multiplier = options.get("fps_multiplier", 1)
        multiplier = multiplier if multiplier > 0 else 1  # what it may be is the sampler's to say
        if self.pipe.prior.deterministic:
            num_samples = 1  # all there is
        size = tuple(self.spec[f"frame_{side}"] + 2 * BORDER for side in ("height", "width"))
        scale, columns = layout(num_samples + 1, *size)
        most = MOST_PIXELS // ((num_samples + 1) * scale**2 * math.prod(size))
        if n_frames > most:
            raise ValueError(f"frames to predict: expected at most {most} of {num_samples} futures, found {n_frames}")
        check_video("a.mp4", *labelled_size(num_samples + 1, *size, scale, columns))

        context, truth, fps = self.read(clip, start, n_context, n_frames, multiplier)
        self.pipe.set_progress_bar_config(desc=clip.name, on_update=on_update)
        began = time.perf_counter()
        futures = self.pipe(
            context,
            n_frames=n_frames,
            num_samples=num_samples,
            generator=torch.Generator().manual_seed(seed),
            value_range=(-1, 1),
            **options,
        ).frames[0]
        took = time.perf_counter() - began

        context, truth = held(context, truth, n_frames, multiplier)
        rows, fps = list(rows_of(context, truth, futures.cpu()).items()), fps * multiplier
        shutil.rmtree(self.folder, ignore_errors=True)  # what came before is gradio's by now
        stem = self.folder / f"{Path(clip.name).stem.replace(' ', '-')}-seed-{seed}"
        frames = labelled_futures(rows, n_frames, fps, scale, columns)
        sheet = Sheet(stem.with_name(f"{stem.name}.png"), *size)
        sheet.add("", rows, len(context))
        files = [*write_both(stem, frames, fps), sheet.path]
        self.n_predicted += 1
        many = "1 future" if num_samples == 1 else f"{num_samples} futures"
        what = f"**{clip.name}**: {many} of {n_frames} frames at {fps:.3g} a second, seed {seed}, in {took:.1f} s"
        return [*map(str, files), what + ("" if truth is not None else "; the clip ends before: no truth is shown")]

    def _value(self, name, value):
        """What a field holds -> what the sampler takes; None: its default."""
        if isinstance(value, str) and not self.options[name].choices:
            return override_value(name, value) if value.strip() else None
        return as_whole(value)

    def stop(self, session):
        """End the prediction that a page waits for, if there is one; None: all that run."""
        self._stopped.add(session)

    def begin(self, session):
        """A page asks for a prediction; what was stopped was another."""
        self._stopped.discard(session)

    def check(self, session):
        """Raise Stopped in a prediction that is to end; None stopped those of all pages."""
        if {session, None} & self._stopped:
            raise Stopped


def as_whole(value):
    """A number from a field, an int where it is whole: fields and JSON do not tell 4 from 4.0."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


def whole(name, value, least, most):
    """A whole number of a field -> int; ValueError where it lies outside."""
    found = as_whole(value)
    if not isinstance(found, int) or not least <= found <= most:
        found = "nothing" if found is None else found
        raise ValueError(f"{name}: expected a whole number from {least} to {most}, found {found}")
    return found


@contextlib.contextmanager
def sentences(clip=None):
    """Errors become one sentence on the page, which goes on."""
    try:
        yield
    except Stopped:
        raise
    except Exception as error:
        line = error_line(error)
        if clip is not None and clip.path is not None:
            line = line.replace(str(clip.path), clip.name)  # where uploads lie says nothing
        logger.warning("%s", line)
        if not isinstance(error, (ValueError, OSError)):
            logger.debug("", exc_info=True)
        raise gr.Error(line, duration=20, print_exception=False) from None


def range_text(option):
    """A SamplerOption's range in words; empty where it has none."""
    lower = f"at least {option.least}" if option.above is None else f"above {option.above}"
    if option.above is None and option.least is None:
        return ""
    return lower if option.most is None else f"{lower}, at most {option.most}"


def number(value, label, name, interactive=True):
    """A field of a number; what it may be is checked, and said, by those who take it."""
    return gr.Number(value, label=label, min_width=90, elem_id=name, interactive=interactive)


def field(name, option):
    """A component for a sampler option. One that is off by default, or that is a list or a dict, is a text, read as on
    the command line: gradio's numbers cannot be empty."""
    shown = {"label": name.replace("_", " "), "elem_id": name, "min_width": 140}
    if option.kind is bool:
        return gr.Checkbox(option.default, **shown)
    if option.choices:
        return gr.Dropdown(list(option.choices), value=option.default, **shown | {"min_width": 240})
    if option.kind in (int, float) and option.default is not None:
        step = 1 if option.kind is int else 0.05
        return gr.Number(option.default, info=range_text(option), step=step, **shown)
    return gr.Textbox(option.default or "", info=range_text(option), placeholder="off", max_lines=1, **shown)


def build(playground, title):
    """The page -> gr.Blocks."""
    prior, examples = playground.pipe.prior, playground.examples
    first = examples[0] if examples else None
    options = dict(playground.options)
    rate = options.pop("fps_multiplier", None)
    with gr.Blocks(title=f"{title} - latentcast", delete_cache=(HOUR // 6, HOUR), analytics_enabled=False) as page:
        clip = gr.State(first)
        gr.Markdown(f"## {title}\n{type(prior).__name__} predicts what comes next: choose a clip, then *Predict*.")
        with gr.Row():
            with gr.Column(scale=2, min_width=320):
                if examples:
                    gr.Markdown("#### Example clips")
                    gallery = gr.Gallery(
                        [thumbnail(playground, example) for example in examples],
                        show_label=False,
                        columns=4,
                        height="auto",
                        selected_index=0,
                        allow_preview=False,
                        interactive=False,
                        buttons=[],
                        format="png",
                        elem_id="examples",
                    )
                gr.Markdown("#### Your video")
                upload = gr.File(show_label=False, height=76, elem_id="upload")
                about = gr.Markdown(elem_id="about")
                picture = gr.Image(
                    show_label=False, interactive=False, buttons=[], height=110, format="png", elem_id="given"
                )
                with gr.Row():
                    start = number(0, "First frame", "start")
                    n_context = number(playground.n_context, "Given", "n_context")
                    n_frames = number(offered_frames(first, playground), "Predict", "n_frames")
                fields = {}
                with gr.Row():
                    n_offered = 1 if prior.deterministic else 4
                    num_samples = number(n_offered, "Futures", "num_samples", interactive=not prior.deterministic)
                    seed = number(0, "Seed", "seed")
                    if rate:
                        fields["fps_multiplier"] = number(rate.default, "Frame rate ×", "fps_multiplier")
                go = gr.Button("Predict", variant="primary", elem_id="predict")
                with gr.Row():
                    again = gr.Button("Next seed", size="md", min_width=120, elem_id="again")
                    halt = gr.Button("Stop", size="md", min_width=120, elem_id="stop")
                if options:
                    with gr.Accordion("Sampler options", open=False, elem_id="options"):
                        with gr.Row():
                            for name, option in options.items():
                                fields[name] = field(name, option)
            with gr.Column(scale=3, min_width=320):
                gr.Markdown("#### Futures, in step")
                video = gr.Video(
                    show_label=False, autoplay=True, loop=True, interactive=False, buttons=[], elem_id="video"
                )
                said = gr.Markdown(elem_id="said")
                sheet = gr.Image(
                    show_label=False,
                    type="filepath",
                    format="png",
                    interactive=False,
                    buttons=["fullscreen"],
                    elem_id="sheet",
                )
                with gr.Row():
                    downloads = [
                        gr.DownloadButton(name, size="md", interactive=False, min_width=90, elem_id=f"download-{kind}")
                        for name, kind in (("mp4", "mp4"), ("GIF", "gif"), ("Sheet", "png"))
                    ]

        place = [start, n_context]

        def show(clip, start, n_context):
            if clip is None:
                return None, "Choose a clip."
            with sentences(clip):
                return playground.given(clip, start, n_context)

        def take_example(event: gr.SelectData):
            chosen = examples[event.index]
            return chosen, None, 0, offered_frames(chosen, playground)

        def take_file(file, n_context):
            chosen = Clip(Path(file).name, path=Path(file))
            unmarked = [gr.Gallery(selected_index=None)] * len(marked)
            return chosen, 0, *unmarked, *show(chosen, 0, n_context)  # an error leaves the clip before

        def leave_file(clip):
            return clip if clip is not None and clip.path is None else first

        def predict(values, request: gr.Request, progress=gr.Progress()):  # noqa: B008 (how gradio knows it)
            session, chosen, told = request.session_hash, values[clip], 0.0

            def on_update(done, total):
                nonlocal told
                playground.check(session)
                if done < total and time.monotonic() - told < TOLD_EVERY:  # a browser falls behind thousands of steps
                    return
                told = time.monotonic()
                progress((done, total), desc="predicting" if done < total else "decoding", unit="steps")

            progress(0, desc="reading the clip")
            numbers = [values[part] for part in (start, n_context, n_frames, num_samples, seed)]
            given = {name: values[part] for name, part in fields.items()}
            try:
                playground.check(session)  # while it waited for its turn
                with sentences(chosen):
                    *files, words = playground.predict(chosen, *numbers, given, on_update)
            except Stopped:
                gr.Info("Stopped.")
                return [gr.skip()] * 6
            buttons = [gr.DownloadButton(value=path, interactive=True) for path in files]
            return files[0], files[-1], words, *buttons

        inputs = {clip, *place, n_frames, num_samples, seed, *fields.values()}
        outputs = [video, sheet, said, *downloads]
        job = {"inputs": inputs, "outputs": outputs, "concurrency_limit": 1, "concurrency_id": "pipeline"}
        quick = {"show_progress": "hidden", "api_visibility": "private"}
        shown = {"inputs": [clip, *place], "outputs": [picture, about], "show_progress": "minimal"}
        shown |= {"trigger_mode": "always_last", "api_visibility": "private"}
        marked = [gallery] if examples else []
        if examples:
            gallery.select(take_example, None, [clip, upload, start, n_frames], **quick).then(show, **shown)
        taken = upload.upload(take_file, [upload, n_context], [clip, start, *marked, picture, about], **quick)
        taken.failure(lambda: None, None, upload, **quick)
        upload.clear(leave_file, clip, clip, **quick).then(show, **shown)
        gr.on([event for part in place for event in (part.blur, part.submit)], show, **shown)
        page.load(show, **shown)

        def begin(request: gr.Request):
            playground.begin(request.session_hash)

        def begin_next(seed, request: gr.Request):
            playground.begin(request.session_hash)
            return int(seed or 0) + 1

        def end(request: gr.Request):
            playground.stop(request.session_hash)

        for begun in (go.click(begin, **quick, queue=False), again.click(begin_next, seed, seed, **quick, queue=False)):
            begun.then(predict, **job, show_progress_on=[video], api_visibility="private")
        halt.click(end, **quick, queue=False)
        page.unload(end)
    return page


def offered_frames(clip, playground):
    """How many frames to predict at first: as many as an example has left, else 16."""
    left = len(clip.frames) - playground.n_context if clip is not None and clip.frames is not None else 0
    return left if left > 0 else 16


def thumbnail(playground, clip):
    """A clip's last given frame, (H, W, 3) uint8."""
    frame = clip.frames[min(playground.n_context, len(clip.frames)) - 1]
    return to_uint8(enlarge(shown_channels(frame)[None], scale_for(len(frame[0])))[0], n_dims=3)


@contextlib.contextmanager
def serving(pipe, examples, title, folder, host, port, most_mb, most_read):
    """Serve the page while the block runs -> (its address, the Playground).

    Args:
        pipe, examples, most_read: see ``Playground``. title: of the page.
        folder: for files, one of the system's temporary ones. Uploads lie where GRADIO_TEMP_DIR said when gradio was
            loaded; nothing else is served.
        host, port: to listen at. most_mb: the largest upload, megabytes.
    Raises:
        OSError: the port cannot be had.
    """
    os.environ.pop("GRADIO_ALLOWED_PATHS", None)
    for name in ("no_proxy", "NO_PROXY"):  # gradio asks its own server whether it is there
        os.environ[name] = ",".join([*filter(None, [os.environ.get(name)]), *LOCAL])
    playground = Playground(pipe, examples, Path(folder) / "futures", most_read)
    page = build(playground, title)
    page.queue(max_size=WAITING, default_concurrency_limit=1, api_open=False)
    fonts = [["system-ui", "sans-serif"], ["ui-monospace", "monospace"]]
    _, address, _ = page.launch(
        server_name=host,
        server_port=port,
        share=False,
        quiet=True,
        inbrowser=False,
        prevent_thread_lock=True,
        show_error=True,
        max_file_size=round(most_mb * 1e6),
        allowed_paths=[],
        ssr_mode=False,
        pwa=False,
        mcp_server=False,
        enable_monitoring=False,
        run_history=False,
        footer_links=[],
        app_kwargs={"middleware": guards(host)},
        theme=gr.themes.Default(font=fonts[0], font_mono=fonts[1]),
        css=CSS,
    )
    try:
        yield address, playground
    finally:
        playground.stop(None)  # whatever runs
        page.close(verbose=False)
