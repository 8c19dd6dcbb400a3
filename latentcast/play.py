"""A prior as a game in the browser: keys choose the action, the next frame is predicted and shown, step by step."""

import base64
import collections
import contextlib
import io
import json
import logging
import tempfile
import threading
import time
from pathlib import Path

import torch
import uvicorn
from PIL import Image
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.responses import HTMLResponse, JSONResponse, Response
from starlette.routing import Route

from latentcast.cli import error_line
from latentcast.data.video.writer import to_uint8, write_video
from latentcast.layers.conditions import Numbers
from latentcast.serving import guards

logger = logging.getLogger("latentcast")

PAGE = Path(__file__).with_name("play.html")
MOST_GAMES = 8  # kept; the one that was not played for longest goes
MOST_RECORDED = 20_000  # frames
MOST_SENT = 1 << 16  # bytes of a request
REACH = 3  # standard deviations that a slider goes from the mean of what training was told


class Game:
    """One future of a clip, told step by step what leads to its next frame.

    Args:
        pipe: a VideoPredictionPipeline, on its device.
        clips: ShownClips, whose first ``n_context`` frames are what a game begins with.
        n_context: frames given. sampler: options of the prior's sampler.
    Attributes:
        controls: of each condition a dict: ``name``, ``per``, ``shape`` and either ``n_values`` (with ``names``, where
            the data name them) or the ranges of its numbers, ``least`` and ``most``.
    """

    def __init__(self, pipe, clips, n_context, sampler=None):
        self.pipe, self.clips, self.n_context, self.sampler = pipe, clips, n_context, dict(sampler or {})
        self.controls = controls(pipe.prior)
        self.reset()

    def reset(self, clip=0, seed=0, of_video=None):
        """Begin anew -> what is given, (n_context, C, H, W) in [-1, 1].

        Args:
            clip: number of the clip. seed: of all that is drawn.
            of_video: conditions per video, name -> value; those of the clip for what is not named.
        Raises:
            ValueError: no such clip, or a value outside its range.
        """
        if not 0 <= clip < len(self.clips.frames):
            raise ValueError(f"clip: expected 0 to {len(self.clips.frames) - 1}, found {clip}")
        given = self.clips.frames[clip : clip + 1, : self.n_context]
        prior, one = self.pipe.prior, slice(clip, clip + 1)
        told = self.clips.told(prior.conditions, len(self.clips.frames), self.n_context)
        told = told and {name: value[one] for name, value in told.items()}
        for name, value in (of_video or {}).items():
            told = (told or {}) | {name: torch.as_tensor(value)[None]}
        generator = torch.Generator().manual_seed(seed)
        settings = {"conditions": told, "generator": generator, "value_range": (-1, 1)}
        self._rollout = self.pipe.rollout(given, **settings, **self.sampler)
        self.shown = list(given[0])
        return given[0]

    def step(self, values):
        """Predict the next frame -> (C, H, W) in [-1, 1].

        Args:
            values: name -> value of all conditions per frame; None or {}: nothing is told.
        Raises:
            ValueError: a value outside its range, or a name that the prior does not know.
        """
        frame = self._rollout.step(values or None)[0, 0].cpu()
        if len(self.shown) < MOST_RECORDED:
            self.shown.append(frame)
        return frame

    def record(self, fps):
        """All frames since the last ``reset`` as an mp4 -> its bytes."""
        with tempfile.TemporaryDirectory(prefix="latentcast-play-") as folder:
            path = Path(folder) / "play.mp4"
            write_video(path, torch.stack(self.shown), fps)
            return path.read_bytes()


def controls(prior):
    """See ``Game``; what a page needs to know of a prior's conditions, JSON-able."""
    found = []
    declared = {} if prior.conditioner is None else prior.conditioner.declared
    for (name, spec), network in zip(declared.items(), prior.conditioner.networks if declared else ()):
        control = {"name": name, "per": spec["per"], "shape": list(spec["shape"])}
        if isinstance(network, Numbers):
            mean, spread = network.mean.float(), network.spread.float()
            ends = {"least": mean - REACH * spread, "most": mean + REACH * spread, "mean": mean}
            control |= {end: value.tolist() for end, value in ends.items()}
        else:
            control |= {"n_values": spec["n_values"], "names": spec.get("names")}
        found.append(control)
    return found


class Arcade:
    """Games of several pages, which take turns: the routes of the server.

    Args:
        make_game: -> a new Game. title, fps, n_clips: for the page.
    Attributes:
        n_predicted: frames so far. busy: seconds that they took.
    """

    def __init__(self, make_game, title, fps):
        self.make_game, self.title, self.fps = make_game, title, fps
        self.n_predicted, self.busy = 0, 0.0
        self._games, self._turn = collections.OrderedDict(), threading.Lock()
        self._first = make_game()  # now: what it lacks must not wait for a player

    def routes(self):
        jobs = {"reset": self._reset, "step": self._step, "record": self._record}
        asked = [Route(f"/api/{name}", self._answer(job), methods=["POST"]) for name, job in jobs.items()]
        return [Route("/", self._page), *asked]

    async def _page(self, request):
        shown = {
            "title": self.title,
            "fps": self.fps,
            "clips": self._first.clips.names,
            "controls": self._first.controls,
        }
        text = json.dumps(shown).replace("<", "\\u003c")  # a name may hold what ends a script
        return HTMLResponse(PAGE.read_text(encoding="utf-8").replace("/*GAME*/ null", text))

    def _answer(self, job):
        async def answer(request):
            if request.headers.get("content-type") != "application/json":  # what other sites cannot send
                return JSONResponse({"error": "expected application/json"}, 415)
            body = b""
            async for part in request.stream():
                body += part
                if len(body) > MOST_SENT:
                    return JSONResponse({"error": f"expected at most {MOST_SENT} bytes"}, 413)
            try:
                asked = json.loads(body)
                session = str(asked["session"])[:64]
            except (ValueError, KeyError, TypeError):
                return JSONResponse({"error": "expected JSON with a session"}, 400)
            try:
                return await run_in_threadpool(self._in_turn, job, session, asked)
            except Exception as error:  # whatever a page asks for: the game goes on
                return JSONResponse({"error": error_line(error)}, 400)

        return answer

    def _in_turn(self, job, session, asked):
        with self._turn:
            if session not in self._games:
                self._games[session] = self.make_game()
            self._games.move_to_end(session)
            while len(self._games) > MOST_GAMES:
                self._games.popitem(last=False)
            return job(self._games[session], asked)

    def _reset(self, game, asked):
        given = game.reset(whole(asked, "clip"), whole(asked, "seed"), asked.get("of_video"))
        return JSONResponse({"frames": [as_png(frame) for frame in given]})

    def _step(self, game, asked):
        began = time.perf_counter()
        frame = game.step(asked.get("conditions"))
        took = time.perf_counter() - began
        self.n_predicted, self.busy = self.n_predicted + 1, self.busy + took
        return JSONResponse({"frame": as_png(frame), "seconds": took, "recorded": len(game.shown)})

    def _record(self, game, asked):
        return Response(game.record(self.fps), media_type="video/mp4")


def whole(asked, name):
    value = asked.get(name, 0)
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < 2**53:
        raise ValueError(f"{name}: expected a whole number of at least 0, found {value!r:.80}")
    return value


def as_png(frame):
    """(C, H, W) in [-1, 1] -> base64 of a PNG."""
    file = io.BytesIO()
    Image.fromarray(to_uint8(frame, n_dims=3)).save(file, format="PNG", compress_level=1)
    return base64.b64encode(file.getvalue()).decode()


@contextlib.contextmanager
def serving(arcade, host, port):
    """Serve an Arcade while the block runs -> its address.

    Raises:
        OSError: the server does not come up.
    """
    app = Starlette(routes=arcade.routes(), middleware=guards(host))
    server = uvicorn.Server(uvicorn.Config(app, host=host, port=port, log_level="warning", lifespan="off"))
    server.install_signal_handlers = lambda: None
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        if not thread.is_alive():
            raise OSError(f"{host}:{port}: the server did not come up")
        time.sleep(0.02)
    try:
        yield f"http://{f'[{host}]' if ':' in host else host}:{port}/"
    finally:
        server.should_exit = True
        thread.join(10)
