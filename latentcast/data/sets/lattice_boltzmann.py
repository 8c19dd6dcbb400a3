"""Two-dimensional flow of a nearly incompressible fluid by the lattice-Boltzmann method (D2Q9, BGK collisions).

Lattice units throughout: a cell is 1 wide, a tick lasts 1, the fluid at rest has density 1. Arrays are (H, W), rows
along y and columns along x; vectors are (x, y). The method is the textbook's (Krüger et al., The Lattice Boltzmann
Method, 2017): equilibrium and collisions in chapter 3, bounce-back and momentum exchange in chapter 5.
"""

import logging

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor

logger = logging.getLogger("latentcast")

# Population i moves by VELOCITIES[i] a tick and 8 - i the opposite way; slices pick all that move to one side.
VELOCITIES = tuple((x, y) for x in (-1, 0, 1) for y in (-1, 0, 1))
WEIGHTS = tuple((4 / 9, 1 / 9, 1 / 36)[abs(x) + abs(y)] for x, y in VELOCITIES)
TO_LEFT, TO_RIGHT, TO_LOWER_ROWS, TO_HIGHER_ROWS = slice(0, 3), slice(6, 9), slice(0, 9, 3), slice(2, 9, 3)

MIN_RELAXATION_TIME = 0.505  # ticks; at 0.5 no viscosity is left, and BGK becomes unstable before
MAX_SPEED = 0.15  # a quarter of the speed of sound; errors by compressibility grow as the square of the speed
SOUND_SPEED = 3**-0.5


class LatticeBoltzmann:
    """Flow in a box of H x W cells, some of them solid; periodic at top and bottom.

    Left and right are periodic too, or fluid enters at the left with a given velocity (a ghost column in equilibrium
    at density 1) and leaves at the right (a ghost column that follows its neighbour at the speed of sound and so lets
    sound out, where a copy of the neighbour would throw it back). Solids are at rest; their walls lie half-way between
    fluid and solid cells and conserve mass. At first the fluid moves everywhere at the inflow's speed, or rests.

    Populations are kept as deviations from those of the fluid at rest, which saves digits of float32.

    Args:
        solid: (H, W) bool; True where there is no fluid.
        viscosity: kinematic, at least (``MIN_RELAXATION_TIME`` - 1/2) / 3.
        inflow: speed along x at the left edge, at most ``MAX_SPEED``; None: periodic.
        force: body force along x, per unit volume.
        device: where the fields live.
        compile: fuse a tick's arithmetic by torch.compile, several times as fast. Where that does not work a warning
            is logged and the plain operations run. The two agree up to rounding.
    Attributes:
        tick: ticks since the start.
    Raises:
        ValueError: a parameter outside the range in which the method holds.
    """

    def __init__(
        self,
        solid: Bool[Tensor, "H W"],
        viscosity: float,
        inflow: float | None = None,
        force: float = 0.0,
        device: str | torch.device = "cpu",
        compile: bool = False,
    ) -> None:
        if solid.ndim != 2 or solid.dtype != torch.bool:
            raise ValueError(f"solid: expected (H, W) bool, found {tuple(solid.shape)} {solid.dtype}")
        relaxation_time = 0.5 + 3 * viscosity
        if not relaxation_time >= MIN_RELAXATION_TIME:
            least = (MIN_RELAXATION_TIME - 0.5) / 3
            raise ValueError(
                f"viscosity: expected at least {least:.5f} (relaxation time {MIN_RELAXATION_TIME}),"
                f" found {viscosity:.5f} ({relaxation_time:.4f})"
            )
        if inflow is not None and not 0 <= inflow <= MAX_SPEED:
            raise ValueError(f"inflow: expected a speed of 0 to {MAX_SPEED} cells a tick, found {inflow}")
        self.tick = 0
        self._inflow, self._force = inflow, force
        self._height, self._width = solid.shape
        rows, columns = self._height + 2, self._width + 2

        # Two buffers take turns, with one ghost cell all around. One step along (x, y) is a step by y * columns + x in
        # memory, so streaming means to read each population from a shifted slice. The slices run from the first inner
        # cell to the last and hold some ghost cells too, which ``fluid`` sets to zero.
        shifts = [y * columns + x for x, y in VELOCITIES]
        first, span = columns + 1, self._height * columns - 2
        self._buffers = [torch.zeros(9, rows * columns, device=device) for _ in range(2)]
        self._sources = [[f[i, first - s :][:span] for i, s in enumerate(shifts)] for f in self._buffers]
        self._targets = [[f[i, first:][:span] for i in range(9)] for f in self._buffers]
        self._fluid = F.pad((~solid).float(), (1, 1, 1, 1)).to(device)
        self._fluid_span = self._fluid.view(-1)[first:][:span]
        # A tensor, lest each viscosity be compiled anew.
        self._rate = torch.tensor(1 / relaxation_time, device=device)

        # Where a population would stream out of a solid cell, and the one that bounces back there instead.
        ghosts = F.pad(solid[None].float(), (1, 1, 0, 0), "circular" if inflow is None else "constant")
        ghosts = F.pad(ghosts, (0, 0, 1, 1), "circular")[0].bool()
        leaving, bouncing, directions = [], [], []
        for i, (x, y) in enumerate(VELOCITIES):
            behind = ghosts[1 - y :, 1 - x :][: self._height, : self._width]
            row, column = torch.nonzero(~solid & behind, as_tuple=True)
            place = (row + 1) * columns + column + 1
            leaving.append(i * rows * columns + place - shifts[i])
            bouncing.append((8 - i) * rows * columns + place)
            directions.append(torch.tensor([[-x], [-y]], dtype=torch.float32).expand(2, len(place)))
        self._leaving, self._bouncing = torch.cat(leaving).to(device), torch.cat(bouncing).to(device)
        self._directions = torch.cat(directions, 1).to(device)

        self._update = self._compiled() if compile else _stream_and_collide
        self.start(torch.tensor([inflow or 0.0, 0.0])[:, None, None].expand(2, *solid.shape))

    def _compiled(self):
        update = torch.compile(_stream_and_collide, dynamic=False)
        try:
            self._run_update(update, 0)
        except Exception as error:  # a missing compiler shows in many ways
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            logger.warning("lattice Boltzmann: runs slower, for torch.compile does not work here: %s", reason)
            return _stream_and_collide
        return update

    @torch.no_grad()
    def _run_update(self, update, source):
        update(self._sources[source], self._targets[1 - source], self._fluid_span, self._rate, self._force)

    def start(self, velocity: Float[Tensor, "2 H W"]) -> None:
        """Set the fluid to ``velocity``, in equilibrium at density 1, and count ticks from 0."""
        self.tick = 0
        velocity = F.pad(velocity.to(self._fluid) * self._fluid[1:-1, 1:-1], (1, 1, 1, 1), "replicate")
        self._buffers[0].copy_(_equilibrium(velocity).flatten(1))
        entering = None if self._inflow is None else _equilibrium(velocity[:, 1:-1, 0])[TO_RIGHT]
        self._fill_ghosts(0, entering, follow=None)

    @torch.no_grad()
    def advance(self, ticks: int, inflow: Float[Tensor, "{ticks} 2 H"] | None = None) -> None:
        """Move on by ``ticks``.

        Args:
            inflow: (ticks, 2, H) velocity at the left edge; None: uniform, as set at first.
        Raises:
            FloatingPointError: the flow blew up; names the tick at which this was noticed.
        """
        entering = None
        if self._inflow is not None:
            if inflow is None:
                inflow = torch.tensor([self._inflow, 0.0])[None, :, None].expand(ticks, 2, self._height)
            entering = _equilibrium(inflow.transpose(0, 1).to(self._fluid)).transpose(0, 1)[:, TO_RIGHT].contiguous()
        for n in range(ticks):
            source = self.tick % 2
            self._run_update(self._update, source)
            self._fill_ghosts(1 - source, None if entering is None else entering[n], follow=source)
            self.tick += 1
        if not self._populations().sum().isfinite():
            raise FloatingPointError(f"tick {self.tick}: the flow blew up, its density is no longer finite")

    def _fill_ghosts(self, buffer, entering, follow):
        """Everything that will stream into fluid cells from elsewhere: inflow, outflow, the other edge, walls."""
        f = self._buffers[buffer].view(9, *self._fluid.shape)
        if entering is None:
            f[TO_RIGHT, :, 0] = f[TO_RIGHT, :, -2]
            f[TO_LEFT, :, -1] = f[TO_LEFT, :, 1]
        else:
            f[TO_RIGHT, 1:-1, 0] = entering
            if follow is not None:  # ghost <- (ghost + c * neighbour) / (1 + c)
                last = self._buffers[follow].view_as(f)[TO_LEFT, 1:-1, -1]
                f[TO_LEFT, 1:-1, -1] = torch.lerp(f[TO_LEFT, 1:-1, -2], last, 1 / (1 + SOUND_SPEED))
        f[TO_HIGHER_ROWS, 0] = f[TO_HIGHER_ROWS, -2]
        f[TO_LOWER_ROWS, -1] = f[TO_LOWER_ROWS, 1]
        flat = self._buffers[buffer].view(-1)
        flat[self._leaving] = flat[self._bouncing]

    def _populations(self):
        """(9, H, W), after collision."""
        return self._buffers[self.tick % 2].view(9, *self._fluid.shape)[:, 1:-1, 1:-1]

    def density(self) -> Float[Tensor, "H W"]:
        """Minus 1, so that small changes keep their digits; 0 in solids."""
        return self._populations().sum(0) * self._fluid[1:-1, 1:-1]

    def velocity(self) -> Float[Tensor, "2 H W"]:
        """Along x and y, cells a tick; 0 in solids."""
        f = self._populations()
        momentum = torch.stack(_momentum(f))
        # A force enters by collisions; half of it belongs to the coming half tick.
        momentum[0] -= self._force / 2
        return momentum / (1 + self.density()) * self._fluid[1:-1, 1:-1]

    def vorticity(self) -> Float[Tensor, "H W"]:
        """dv/dx - du/dy by central differences, one-sided at the left and right edges, per tick."""
        u, v = self.velocity()
        return torch.gradient(v, dim=1)[0] - (u.roll(-1, 0) - u.roll(1, 0)) / 2

    def force_on_solids(self) -> Float[Tensor, "2"]:
        """Momentum along x and y that the fluid hands to all solids in the coming tick; drag and lift."""
        bounced = self._buffers[self.tick % 2].view(-1)[self._bouncing]
        return 2 * (self._directions * bounced).sum(1)


def _momentum(f):
    """Along x and along y, from nine populations."""
    return sum(f[TO_RIGHT]) - sum(f[TO_LEFT]), sum(f[TO_HIGHER_ROWS]) - sum(f[TO_LOWER_ROWS])


def _along(i, x, y):
    """Component of (x, y) times the length of VELOCITIES[i], in that direction."""
    cx, cy = VELOCITIES[i]
    return cx * x + cy * y if cx and cy else cx * x if cx else cy * y


def _equilibrium(velocity):
    """(2, ...) velocity -> (9, ...) populations at density 1, as deviations from those at rest."""
    x, y = velocity
    along = [_along(i, x, y) for i in range(9)]
    return torch.stack([w * (3 * a + 4.5 * a * a - 1.5 * (x * x + y * y)) for w, a in zip(WEIGHTS, along)])


def _stream_and_collide(sources, targets, fluid, rate, force):
    """One tick: nine 1-D slices shifted against each other -> nine slices in place; ``fluid`` is 0 outside of it."""
    excess = sum(sources[1:], sources[0])
    momentum_x, momentum_y = _momentum(sources)
    x, y = momentum_x / (1 + excess), momentum_y / (1 + excess)
    rest = excess - 1.5 * (x * momentum_x + y * momentum_y)
    keep = 1 - rate
    targets[4].copy_(fluid * (keep * sources[4] + rate * WEIGHTS[4] * rest))
    # The equilibria of opposite populations are the sum and the difference of the same two parts.
    for i in range(4):
        momentum = _along(i, momentum_x, momentum_y)
        even = rest + 4.5 * momentum * _along(i, x, y)
        odd = 3 * momentum
        if force:
            odd = odd + 3 * VELOCITIES[i][0] * force / rate
        share = rate * WEIGHTS[i]
        targets[i].copy_(fluid * (keep * sources[i] + share * (even + odd)))
        targets[8 - i].copy_(fluid * (keep * sources[8 - i] + share * (even - odd)))


def disc(height: int, width: int, x: float, y: float, diameter: float) -> Bool[Tensor, "{height} {width}"]:
    """Cells whose centres lie in the disc around (x, y), in cells from the first one's centre."""
    rows, columns = torch.arange(height)[:, None], torch.arange(width)
    return (columns - x) ** 2 + (rows - y) ** 2 < diameter**2 / 4


def dominant_frequency(signal: Float[Tensor, " N"], interval: float) -> float:
    """Frequency of the largest peak in the spectrum of a (N,) signal sampled every ``interval``.

    Mean removed, Hann window, padded 16-fold, peak refined by a parabola; good to a hundredth of 1 / (N * interval)
    for a sine of several periods."""
    signal = (signal.double() - signal.double().mean()) * torch.hann_window(len(signal), dtype=torch.float64)
    n = 16 * len(signal)
    power = torch.fft.rfft(signal, n).abs()
    k = int(power[1:-1].argmax()) + 1
    below, peak, above = power[k - 1 : k + 2].tolist()
    curvature = below - 2 * peak + above
    shift = (below - above) / (2 * curvature) if curvature else 0.0
    return (k + shift) / (n * interval)


def strouhal_number(lift: Float[Tensor, " N"], interval: float, diameter: float, speed: float) -> float:
    """frequency * diameter / speed, from the lift on a body sampled every ``interval`` ticks."""
    return dominant_frequency(lift, interval) * diameter / speed


def williamson_strouhal(reynolds: float) -> float:
    """Strouhal number of a circular cylinder in an unbounded stream, while vortices leave it in parallel.

    A fit to measurements at Reynolds numbers of 49 to 178 (Williamson, Physics of Fluids 31, 1988)."""
    return -3.3265 / reynolds + 0.1816 + 1.6e-4 * reynolds
