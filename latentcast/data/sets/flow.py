"""Simulated flow past a cylinder: vortices that leave it in turn, as one channel of vorticity.

A set like the Simulation data of residual video diffusion (Yang et al. 2022, Section 3.1), which was not published: a
lattice-Boltzmann solver, a frame every 128 ticks, 8000 frames for training and 2000 for testing. Where that paper is
silent the choices are ours, and ``Flow.provenance`` writes them down.
"""

import logging
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F

from ...urls import Place, Url
from ..base import Clip
from ..video.reader import VideoError
from .base import Benchmark
from .lattice_boltzmann import LatticeBoltzmann, disc, strouhal_number, williamson_strouhal

logger = logging.getLogger("latentcast")

FRAME_SIZES = (128, 64)
NORMALISATIONS = ("minmax", "clipped")
REYNOLDS_RANGE = (60, 200)  # slower streams shed no vortices; faster ones need a finer lattice, and are not flat

KICK = 0.3  # of the inflow's speed: the largest transverse gust behind the cylinder, from which shedding grows
GUSTS = 0.05  # of the inflow's speed: standard deviation of each component's noise at the left edge
GUST_MEMORY = 5.5  # diameters passed, about one shedding period: the noise's correlation time
GUST_MODES = 3  # wavelengths H, H / 2, H / 3 along y
CLIPPED_RANGE = 4.0  # times speed / diameter: less than 1 % of the pixels exceed it
CLEAN_REYNOLDS = 100  # of the run that the Strouhal number is measured in
LIFT_PERIODS = 8
LIFT_INTERVAL = 16  # ticks


@dataclass(frozen=True)
class Stream:
    """A lattice of ``cells`` x ``cells`` with a cylinder; lengths in cells, times in ticks.

    ``settling`` passes before the first frame: until shedding is regular. ``extremes``: by how many cells are pooled to
    a pixel, a bound of |vorticity| * diameter / speed. The largest found at Reynolds 200, where it is highest,
    was 15.6 and 10.6 in 1400 frames of "standard", 10.0 and 7.2 in 800 of "smoke".
    """

    cells: int
    diameter: int
    centre: float
    speed: float
    settling: int
    runs: int
    train_frames: int
    test_frames: int
    extremes: dict


STREAMS = {
    "standard": Stream(256, 20, 80, 0.07, 12800, 8, 1000, 250, {2: 17.0, 4: 12.0}),
    "smoke": Stream(128, 8, 32, 0.05, 5120, 2, 32, 24, {1: 11.0, 2: 8.0}),
}


class Flow(Benchmark):
    """Vorticity of the stream past a cylinder between Reynolds 100 and 200; 128 or 64 pixels, a video a run.

    Runs differ in Reynolds number, place of the cylinder (a few cells up or down), first gust and inflow noise: a clean
    stream is periodic, and its test frames would be the training frames. A run's test video is a simulation of its own
    with the training video's Reynolds number and cylinder but other gusts, so neither continues the other.

    Args:
        source: nothing is read; None.
        protocol: "standard" (256 x 256 cells, 8 runs of 1000 + 250 frames) or "smoke" (a small and complete set).
        frame_size: 128 or 64 pixels, averages over squares of cells.
        ticks: between frames.
        seed: of places and gusts.
        normalisation: of vorticity to [0, 1], zero at 1/2. "minmax": by fixed bounds that hold the whole set (see
            ``Stream``). The cylinder's boundary layer sets them, so the wake fills a part of the range. "clipped": to
            +-4 speed / diameter.
        n_runs, train_frames, test_frames: None: the protocol's.
        reynolds: (least, largest) Reynolds number; run i of n has that of a fraction (i + 1/2) / n between.
        device: where to simulate.
        compile: see ``LatticeBoltzmann``; None: on a CPU, but for "smoke", which ends sooner without.
    Raises:
        ValueError: an option outside its range.
    """

    name = "flow"
    protocols = tuple(STREAMS)
    needs_source = False
    channels = 1
    shard_videos = 1

    def __init__(
        self,
        source: Place | None = None,
        protocol: str | None = None,
        *,
        frame_size: int = 128,
        ticks: int = 128,
        seed: int = 0,
        normalisation: str = "minmax",
        n_runs: int | None = None,
        train_frames: int | None = None,
        test_frames: int | None = None,
        reynolds: Sequence[float] = (100, 200),
        device: str = "cpu",
        compile: bool | None = None,
    ) -> None:
        super().__init__(source, protocol)
        self._stream = stream = STREAMS[self.protocol]
        self.frame_size, self.ticks, self.seed, self.normalisation = frame_size, ticks, seed, normalisation
        self.n_runs = stream.runs if n_runs is None else n_runs
        self._lengths = {
            "train": stream.train_frames if train_frames is None else train_frames,
            "test": stream.test_frames if test_frames is None else test_frames,
        }
        if not isinstance(frame_size, int) or frame_size not in FRAME_SIZES:
            raise ValueError(f"frame_size: expected {' or '.join(map(str, FRAME_SIZES))}, found {frame_size}")
        if normalisation not in NORMALISATIONS:
            raise ValueError(f"normalisation: expected {' or '.join(NORMALISATIONS)}, found {normalisation!r}")
        counts = {"ticks": ticks, "n_runs": self.n_runs}
        for option, value in (counts | {f"{split}_frames": n for split, n in self._lengths.items()}).items():
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"{option}: expected a whole number, at least 1, found {value!r}")
        low, high = REYNOLDS_RANGE
        if not (
            isinstance(reynolds, (tuple, list)) and len(reynolds) == 2 and low <= reynolds[0] <= reynolds[1] <= high
        ):
            raise ValueError(f"reynolds: expected two numbers from {low} to {high} in order, found {reynolds!r}")
        self.reynolds = tuple(reynolds)
        try:
            self._device = torch.device(device)
        except RuntimeError as error:
            raise ValueError(f"device: {str(error).splitlines()[0]}") from None
        self._compile = self._device.type == "cpu" and self.protocol != "smoke" if compile is None else compile
        bound = CLIPPED_RANGE if normalisation == "clipped" else stream.extremes[stream.cells // frame_size]
        self._bound = bound * stream.speed / stream.diameter
        self.provenance = self._provenance()

    def _provenance(self):
        stream = self._stream
        runs = []
        for i in range(self.n_runs):
            reynolds, y = self._run(i)
            viscosity = stream.speed * stream.diameter / reynolds
            runs.append(
                {"reynolds": reynolds, "viscosity": viscosity, "relaxation_time": 0.5 + 3 * viscosity, "cylinder_y": y}
            )
        return {
            "method": "lattice Boltzmann, D2Q9, BGK",
            "lattice": [stream.cells, stream.cells],
            "diameter": stream.diameter,
            "cylinder_x": stream.centre,
            "blockage": stream.diameter / stream.cells,
            "inflow_speed": stream.speed,
            "inflow_noise": {"relative": GUSTS, "memory": self._gust_memory(), "modes": GUST_MODES},
            "kick": KICK,
            "settling_ticks": stream.settling,
            "vorticity_bounds": [-self._bound, self._bound],
            "runs": runs,
        }

    def _gust_memory(self):
        return GUST_MEMORY * self._stream.diameter / self._stream.speed

    def _run(self, index):
        """Reynolds number and the cylinder's y, cells, of a run; the same in train and test."""
        low, high = self.reynolds
        reynolds = low + (high - low) * (index + 0.5) / self.n_runs
        nudge = random.Random(f"flow {self.seed} {index}").uniform(-0.1, 0.1) * self._stream.diameter
        return reynolds, (self._stream.cells - 1) / 2 + nudge

    def videos(self) -> dict[str, list[str]]:
        names = [f"run{i}" for i in range(self.n_runs)]
        return {"train": names, "test": names}

    def expected_counts(self) -> dict[str, int]:
        return {split: self.n_runs for split in self._lengths}

    def read(self, split: str, name: str) -> Clip:
        return Clip(frames=self._frames(split, int(name.removeprefix("run")), self._lengths[split]))

    def _frames(self, split, run, n_frames, piece=16):
        stream = self._stream
        # One stream of random numbers on the CPU, whatever the device: the same gusts everywhere.
        generator = torch.Generator().manual_seed(random.Random(f"flow {self.seed} {split} {run}").getrandbits(63))
        side, strength = torch.rand(2, generator=generator).tolist()
        kick = KICK * (1 + strength) / 2 * (1 if side < 0.5 else -1)
        gusts = _Gusts(stream.cells, GUSTS * stream.speed, self._gust_memory(), generator)
        solver = self._solver(*self._run(run), kick)
        started = time.perf_counter()
        try:
            for ticks in _blocks(stream.settling, 128):
                solver.advance(ticks, gusts.advance(ticks, stream.speed))
            for frames in _blocks(n_frames, piece):
                taken = []
                for _ in range(frames):
                    solver.advance(self.ticks, gusts.advance(self.ticks, stream.speed))
                    taken.append(self._frame(solver.vorticity()))
                yield torch.stack(taken)
        except FloatingPointError as error:
            raise VideoError(f"flow {split}/run{run}: {error}") from error
        rate = _mlups(solver, solver.tick, time.perf_counter() - started)
        logger.info("flow %s/run%d: %d frames, %.0f million lattice updates a second", split, run, n_frames, rate)

    def _solver(self, reynolds, y, kick):
        stream = self._stream
        size, x, diameter, speed = stream.cells, stream.centre, stream.diameter, stream.speed
        solid = disc(size, size, x, y, diameter)
        solver = LatticeBoltzmann(
            solid, speed * diameter / reynolds, inflow=speed, device=self._device, compile=self._compile
        )
        rows, columns = torch.arange(size)[:, None], torch.arange(size)
        distance = ((columns - x - 2 * diameter) ** 2 + (rows - y) ** 2) ** 0.5
        gust = kick * speed * torch.exp(-((distance / diameter) ** 2) / 2)
        solver.start(torch.stack([torch.full((size, size), speed), gust]))
        return solver

    def _frame(self, vorticity):
        """(cells, cells) -> (1, frame_size, frame_size) uint8."""
        pooled = F.avg_pool2d(vorticity[None], self._stream.cells // self.frame_size)
        return (((pooled / self._bound + 1) / 2).clamp(0, 1) * 255).round().to(torch.uint8).cpu()

    def describe(self) -> dict:
        lengths = {f"{split}_frames": n for split, n in self._lengths.items()}
        options = ("protocol", "frame_size", "ticks", "seed", "normalisation", "n_runs")
        return {name: getattr(self, name) for name in options} | lengths | {"reynolds": list(self.reynolds)}

    def figures(self, root: Path | Url | None = None) -> dict:
        """Strouhal number by the lift in one more run of the set's stream, and how fast that ran.

        It is at Reynolds 100 and without inflow noise, which would blur the peak; all else is as in the set. The value
        from the literature is that of an unbounded stream. Ours is one of a row of cylinders, a period apart, and
        should lie above it: where a fraction ``blockage`` of the width is taken, the fluid passes the gaps faster by
        1 / (1 - blockage), which is 8.5 % in "standard" and 6.7 % in "smoke".

        Returns:
            dict: ``strouhal``, ``strouhal_literature``, ``reynolds``, ``blockage``, ``mlups`` (million lattice-node
            updates a second).
        """
        stream, reynolds = self._stream, CLEAN_REYNOLDS
        solver = self._solver(reynolds, (stream.cells - 1) / 2, KICK)
        literature = williamson_strouhal(reynolds)
        period = stream.diameter / (stream.speed * literature)
        started = time.perf_counter()
        solver.advance(stream.settling)
        lift = []
        for _ in range(round(LIFT_PERIODS * period / LIFT_INTERVAL)):
            solver.advance(LIFT_INTERVAL)
            lift.append(solver.force_on_solids()[1])
        lift = torch.stack(lift).cpu()
        mlups = _mlups(solver, solver.tick, time.perf_counter() - started)
        strouhal = strouhal_number(lift, LIFT_INTERVAL, stream.diameter, stream.speed)
        blockage = stream.diameter / stream.cells
        logger.info(
            "flow: Strouhal number %.4f at Reynolds %g and %.1f %% blockage, %.4f in an unbounded stream;"
            " %.0f million lattice updates a second",
            *(strouhal, reynolds, 100 * blockage, literature, mlups),
        )
        return {
            "strouhal": round(strouhal, 4),
            "strouhal_literature": round(literature, 4),
            "reynolds": reynolds,
            "blockage": round(blockage, 4),
            "mlups": round(mlups, 1),
        }


class _Gusts:
    """Inflow that wavers: each component a sum of waves along y whose amplitudes are Ornstein-Uhlenbeck processes.

    The uniform wave is left out: it would only send sound through the box.
    """

    def __init__(self, height, deviation, memory, generator):
        wave = torch.arange(1, GUST_MODES + 1)[:, None] * torch.arange(height) * (2 * torch.pi / height)
        self._waves = torch.cat([wave.cos(), wave.sin()]) * deviation / GUST_MODES**0.5
        self._decay = torch.exp(torch.tensor(-1 / memory)).item()
        self._generator = generator
        self._amplitudes = torch.randn(2, 2 * GUST_MODES, generator=generator)

    def advance(self, ticks, speed):
        """(ticks, 2, height): velocity at the left edge."""
        steps = torch.randn(ticks, *self._amplitudes.shape, generator=self._generator)
        steps *= (1 - self._decay**2) ** 0.5
        for n in range(ticks):
            steps[n] += self._decay * self._amplitudes
            self._amplitudes = steps[n]
        velocity = steps @ self._waves
        velocity[:, 0] += speed
        return velocity


def _blocks(total, size):
    return [min(size, total - start) for start in range(0, total, size)]


def _mlups(solver, ticks, seconds):
    return solver.density().numel() * ticks / seconds / 1e6
