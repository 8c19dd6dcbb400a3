"""The neural SDE against closed forms, and what it promises about grids, seeds and gradients."""

import math

import pytest
import torch
from torch import nn

from latentcast.layers.neural_sde import SOLVERS, NeuralSDE, Path, SeededBrownian


class Coefficient(nn.Module):
    """A drift or diffusion given as a function."""

    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, m):
        return self.function(m)


def equation(drift, diffusion=None, **options):
    return NeuralSDE(Coefficient(drift), diffusion and Coefficient(diffusion), **options)


def network(seed=0, channels=2, scale=0.5):
    torch.manual_seed(seed)
    layers = nn.Sequential(
        nn.Conv2d(channels, 4, 3, padding=1), nn.Tanh(), nn.Conv2d(4, channels, 3, padding=1), nn.Tanh()
    )
    return nn.Sequential(layers, Coefficient(lambda m: scale * m))


EVERY_SOLVER = [(kind, solver) for kind, solvers in SOLVERS.items() for solver in solvers]


@pytest.mark.parametrize("sde_type, solver", EVERY_SOLVER)
def test_ornstein_uhlenbeck_has_its_mean_and_variance(sde_type, solver):
    theta, mean, sigma, first = 0.8, 0.5, 0.6, 2.0
    model = equation(
        lambda m: theta * (mean - m), lambda m: torch.full_like(m, sigma), sde_type=sde_type, solver=solver, dt=0.05
    )
    torch.manual_seed(0)
    times = torch.tensor([0.5, 1.0, 3.0])
    found = model(torch.full((1, 1, 128, 128), first), times[None]).flatten(2)[0]
    decay = torch.exp(-theta * times)
    variance = sigma**2 / (2 * theta) * (1 - decay**2)
    standard_error = (variance / found.shape[1]).sqrt()
    assert ((found.mean(1) - (mean + (first - mean) * decay)).abs() < 4 * standard_error + 0.03).all()
    assert ((found.var(1) / variance - 1).abs() < 0.08).all()  # 2 / sqrt(16384) is 0.016, and the step's own error


@pytest.mark.parametrize(
    "sde_type, solver, order",
    [
        ("stratonovich", "euler_heun", 1.0),
        ("stratonovich", "milstein", 1.0),
        ("ito", "euler", 0.5),
        ("ito", "milstein", 1.0),
        ("ito", "srk", 1.5),
    ],
)
def test_solvers_converge_to_geometric_brownian_motion_with_their_order(sde_type, solver, order):
    """m_t = exp((mu - sigma^2 / 2 for Ito) t + sigma W_t), with W_t the solution of dW = dW on the same seed."""
    mu, sigma, seeds = 0.3, 0.7, [(4, 2)]

    def error(dt):
        options = {"sde_type": sde_type, "solver": solver, "dt": dt}
        one, start, zero = torch.ones(1, 1), torch.ones(1, 1, 64, 64), torch.zeros(1, 1, 64, 64)
        path = equation(torch.zeros_like, torch.ones_like, **options)(zero, one, seeds)
        found = equation(lambda m: mu * m, lambda m: sigma * m, **options)(start, one, seeds)
        drift = mu - (sigma**2 / 2 if sde_type == "ito" else 0)
        return (found - torch.exp(drift + sigma * path)).square().mean().sqrt().item()

    coarse, fine = error(1 / 16), error(1 / 64)
    assert fine < 0.1
    assert math.log2(coarse / fine) / 2 == pytest.approx(order, abs=0.2)


def test_an_ode_is_eulers_method():
    model = equation(lambda m: -m, dt=0.1)
    times = torch.tensor([[0.1, 1.0, 2.5]])
    found = model(torch.ones(1, 1, 1, 1), times).flatten()
    torch.testing.assert_close(found, torch.tensor([0.9, 0.9**10, 0.9**25]))
    errors = [
        abs(equation(lambda m: -m, dt=dt)(torch.ones(1, 1, 1, 1), torch.ones(1, 1)).item() - math.exp(-1))
        for dt in (0.1, 0.05)
    ]
    assert errors[0] / errors[1] == pytest.approx(2, rel=0.1)


def test_between_grid_points_it_is_the_straight_line():
    model = equation(lambda m: -m, lambda m: 0.3 * m, dt=0.25)
    start = torch.ones(1, 1, 2, 2)
    found = model(start, torch.tensor([[0.5, 0.6, 0.75]]), [(1,)])[0]
    torch.testing.assert_close(found[1], torch.lerp(found[0], found[2], 0.4))
    before_first = model(start, torch.tensor([[0.1, 0.25]]), [(1,)])[0]
    torch.testing.assert_close(before_first[0], torch.lerp(start[0], before_first[1], 0.4))


@pytest.mark.parametrize("sde_type, solver", EVERY_SOLVER)
def test_shared_times_agree_whatever_else_is_asked_for(sde_type, solver):
    model = NeuralSDE(network(0), network(1), sde_type, solver, dt=0.1)
    start = torch.randn(2, 2, 4, 3)
    seeds = [(7, 0), (7, 1)]
    with torch.no_grad():
        some = model(start, torch.tensor([[1.0, 2.0, 7.3], [0.7, 2.0, 7.25]]), seeds)
        few = model(start, torch.tensor([[2.0], [0.7]]), seeds)
        more = model(start, torch.tensor([[0.33, 1.0, 7.3, 13.0], [0.7, 0.71, 2.0, 7.25]]), seeds)
    assert torch.equal(few[0, 0], some[0, 1]) and torch.equal(few[1, 0], some[1, 0])
    assert torch.equal(more[0, 1:3], some[0, ::2]) and torch.equal(more[1, [0, 2, 3]], some[1])


def test_rows_and_seeds_are_independent_of_each_other():
    model = equation(torch.zeros_like, torch.ones_like, dt=0.1)
    seeds, start, times = [(3, 0), (3, 1), (4, 0)], torch.zeros(3, 1, 64, 64), torch.tensor([6.4, 8.0])
    paths = model(start, times.expand(3, 2), seeds)
    for row in range(3):
        assert torch.equal(paths[row], model(start[:1], times[None], seeds[row : row + 1])[0])
    increments = torch.stack([paths[:, 0], paths[:, 1] - paths[:, 0]], 1).flatten(2).flatten(0, 1)  # across a block
    covariance = torch.cov(increments)
    expected = torch.diag(torch.tensor([6.4, 1.6] * 3))
    assert ((covariance - expected).abs() < 0.08 * 6.4).all()
    assert ((covariance.diag() / expected.diag() - 1).abs() < 0.1).all()


def test_space_time_area_of_seeded_paths_has_its_moments():
    """U = int_0^h W_s ds over a step h = 1: variance 1/3, covariance with W 1/2."""
    brownian = SeededBrownian([(0,), (1,)], torch.zeros(2, 20000), "space-time")
    w, u = brownian(torch.tensor(3.0), torch.tensor(4.0), return_U=True)
    assert w.shape == u.shape == (2, 20000)
    found = torch.cov(torch.stack([w.flatten(), u.flatten()]))
    torch.testing.assert_close(found, torch.tensor([[1.0, 1 / 2], [1 / 2, 1 / 3]]), atol=0.02, rtol=0)


def gradients(model, start, times):
    """Of a loss, with respect to the start and every weight, on one path."""
    torch.manual_seed(5)
    start = start.clone().requires_grad_()
    loss = (model(start, times) * torch.linspace(-1, 1, times.shape[1]).view(-1, 1, 1, 1)).square().sum()
    return torch.autograd.grad(loss, [start, *model.parameters()])


@pytest.mark.parametrize("solver, dt, tolerance", [("reversible_heun", 0.1, 1e-4), ("euler_heun", 0.005, 0.02)])
def test_the_adjoint_gives_the_gradients_of_back_propagation(solver, dt, tolerance):
    """Exactly for the reversible solver, up to the step's error for the others."""
    start, times = torch.randn(2, 2, 3, 3), torch.tensor([[0.5, 1.0], [0.2, 0.8]])
    networks = network(2), network(3)
    direct = gradients(NeuralSDE(*networks, solver=solver, dt=dt), start, times)
    adjoint = gradients(NeuralSDE(*networks, solver=solver, dt=dt, adjoint=True), start, times)
    for ours, theirs in zip(direct, adjoint):
        assert (ours - theirs).norm() < tolerance * ours.norm()


@pytest.mark.parametrize("seeds", [None, [(0,)]])
@pytest.mark.parametrize("diffusion", [None, torch.zeros_like])
def test_an_explosion_stops_with_one_clear_line(diffusion, seeds):
    model = equation(lambda m: m**3, diffusion)
    with pytest.raises(FloatingPointError, match=r"the neural (SDE|ODE) exploded.* at time ") as caught:
        model(torch.full((1, 1, 2, 2), 3.0), torch.tensor([[1.0, 5.0]]), seeds)
    assert "\n" not in str(caught.value)
    with pytest.raises(FloatingPointError, match="is nan"):
        equation(lambda m: m * torch.nan, diffusion)(torch.ones(1, 1, 2, 2), torch.ones(1, 1), seeds)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"sde_type": "skorokhod"}, "sde_type: expected one of stratonovich, ito, found 'skorokhod'"),
        ({"solver": "euler"}, r"solver: expected one of euler_heun, .* \(stratonovich\), found 'euler'"),
        ({"dt": 0}, "dt: expected above 0 and at most 1, found 0"),
        ({"adjoint": True}, "adjoint: expected false for an ODE, found true"),
    ],
)
def test_bad_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        equation(lambda m: m, **options)


def full(value):
    return lambda m: torch.full_like(m, value)


@pytest.mark.parametrize("sde_type, solver", EVERY_SOLVER)
def test_a_constant_control_costs_half_its_square_over_the_noise_and_the_time(sde_type, solver):
    model = equation(lambda m: -0.7 * m, full(0.5), sde_type=sde_type, solver=solver, dt=0.25)
    torch.manual_seed(0)
    m, kl = model(torch.randn(4, 2, 3, 2), torch.tensor([[0.5, 1.3]] * 4), control=lambda m, time: full(0.2)(m))
    assert m.shape == (4, 2, 2, 3, 2)
    # To the end of the last step, 1.5, and for each of 12 numbers.
    torch.testing.assert_close(kl, torch.full((4,), 12 * 0.5 * 0.2**2 / 0.5**2 * 1.5))


@pytest.mark.parametrize("seeds", [None, "paths"])
def test_the_divergence_of_two_ornstein_uhlenbeck_processes_is_its_closed_form(seeds):
    """Prior dm = -a m dt + s dW, posterior dm = (-b m + c) dt + s dW: KL = E int ((a - b) m + c)^2 / (2 s^2) dt."""
    a, b, c, s, first, end = 0.4, 1.1, 0.9, 0.6, 1.5, 2.0
    model = equation(lambda m: -a * m, full(s), dt=0.025)
    n = 2000 if seeds is None else 60
    torch.manual_seed(0)
    rows = None if seeds is None else [(row,) for row in range(n)]
    m, kl = model(torch.full((n, 1, 1, 1), first), torch.full((n, 1), end), rows, lambda m, time: (a - b) * m + c)
    t = torch.linspace(0, end, 20001, dtype=torch.float64)
    mean = c / b + (first - c / b) * torch.exp(-b * t)
    variance = s**2 / (2 * b) * (1 - torch.exp(-2 * b * t))
    u = (a - b) * mean + c
    expected = torch.trapezoid(((a - b) ** 2 * variance + u**2) / (2 * s**2), t).item()
    error = kl.std().item() / n**0.5
    assert abs(kl.mean().item() - expected) < 4 * error + 0.02 * expected
    assert (
        abs(m.mean().item() - mean[-1].item()) < 4 * (variance[-1].item() / n) ** 0.5 + 0.01
    )  # it follows the control


def test_a_control_is_told_the_time_and_none_changes_nothing():
    model, times = equation(lambda m: -m, full(0.3), dt=0.1), []

    def control(m, time):
        times.append(time)
        return torch.zeros_like(m)

    m, kl = model(torch.ones(1, 1, 2, 2), torch.tensor([[2.0]]), [(5,)], control)
    assert (kl == 0).all() and [int(time) for time in sorted(set(times))] == [0] * 10 + [1] * 10
    again, _ = model(torch.ones(1, 1, 2, 2), torch.tensor([[2.0]]), [(5,)], lambda m, time: torch.zeros_like(m))
    assert torch.equal(m, again)


# Told drifts, and paths that are followed step by step --------------------------------------------------------------


class Told(nn.Module):
    """A drift that is moved by what it is told."""

    def __init__(self, network):
        super().__init__()
        self.network = network

    def forward(self, m, told=None):
        return self.network(m if told is None else m + told[..., None, None])


@pytest.mark.parametrize("told", [False, True])
@pytest.mark.parametrize(
    "sde_type, solver, dt, n_frames",
    [
        *((*solver, 0.3, 4) for solver in [*EVERY_SOLVER, ("stratonovich", None)]),
        ("stratonovich", "euler_heun", 0.1, 8),  # across a block of the seeded path
        ("stratonovich", "reversible_heun", 1.0, 4),
    ],
)
def test_where_a_path_pauses_changes_no_bit(sde_type, solver, dt, n_frames, told):
    """Of every solver, those that remember the last drift too, whether the frames lie on its grid or not."""
    diffusion, options = (None, {}) if solver is None else (network(1), {"sde_type": sde_type, "solver": solver})
    model = NeuralSDE(Told(network(0)), diffusion, dt=dt, **options)
    start, seeds, vectors = torch.randn(2, 2, 4, 3), [(7, 0), (7, 1)], torch.randn(2, n_frames, 2)
    tell = (lambda k: vectors[:, k - 1]) if told else None
    with torch.no_grad():
        whole = model(start, torch.arange(1.0, n_frames + 1).expand(2, -1), seeds, told=tell)
        path = Path(model, start, seeds, told=tell)
        assert torch.equal(torch.stack([path.at(k) for k in range(1, n_frames + 1)], 1), whole)


@pytest.mark.parametrize("sde_type, solver", [*EVERY_SOLVER, ("stratonovich", None)])
@pytest.mark.parametrize("dt", [0.5, 0.3])
def test_what_is_told_of_a_later_interval_is_not_known_before(sde_type, solver, dt):
    diffusion, options = (None, {}) if solver is None else (network(1), {"sde_type": sde_type, "solver": solver})
    model = NeuralSDE(Told(network(0)), diffusion, dt=dt, **options)
    start, times, vectors = torch.randn(1, 2, 4, 3), torch.tensor([[0.5, 1.0, 2.0, 2.7]]), torch.randn(1, 3, 2)
    other = torch.cat([vectors[:, :2], -vectors[:, 2:]], 1)
    with torch.no_grad():
        one, two = (model(start, times, [(0,)], told=lambda k, v=v: v[:, k - 1]) for v in (vectors, other))
    assert torch.equal(one[:, :3], two[:, :3]) and not torch.equal(one[:, 3], two[:, 3])


@pytest.mark.parametrize("diffusion", [None, full(1e-3)])
def test_what_is_told_holds_from_frame_to_frame(diffusion):
    """dm = c_k dt + sigma dW: m is the sum of the intervals' c up to its time."""
    model = NeuralSDE(Told(Coefficient(lambda m: m)), diffusion and Coefficient(diffusion), dt=0.1)
    model.drift.forward = lambda m, told: told[..., None, None].expand_as(m)
    c = torch.tensor([[1.0, -2.0, 5.0]])
    found = model(
        torch.zeros(1, 1, 2, 2), torch.tensor([[0.5, 1, 1.5, 2, 3]]), [(0,)], told=lambda k: c[:, k - 1, None]
    )
    expected = torch.tensor([0.5, 1, 0, -1, 4]).view(1, 5, 1, 1, 1).expand_as(found)
    torch.testing.assert_close(found, expected, atol=0.01, rtol=0)


def test_the_divergence_counts_what_the_control_adds_and_not_what_is_told():
    model = NeuralSDE(Told(Coefficient(lambda m: -0.7 * m)), Coefficient(full(0.5)), dt=0.25)
    torch.manual_seed(0)
    told = {"told": lambda k: torch.full((4, 2), float(k))}
    times = torch.tensor([[0.5, 2.3]] * 4)
    _, kl = model(torch.randn(4, 2, 3, 2), times, control=lambda m, time: full(0.2)(m), **told)
    torch.testing.assert_close(kl, torch.full((4,), 12 * 0.5 * 0.2**2 / 0.5**2 * 2.5))


def test_the_adjoint_gives_the_gradients_of_what_is_told():
    start, times = torch.randn(2, 2, 3, 3), torch.tensor([[0.5, 1.7], [0.2, 0.8]])
    networks, found = (Told(network(2)), network(3)), []
    for adjoint in (False, True):
        model = NeuralSDE(*networks, solver="reversible_heun", adjoint=adjoint)
        leaf = torch.linspace(-1, 1, 8).view(2, 2, 2).requires_grad_()
        vectors = 2 * leaf  # computed, as those of a network are
        torch.manual_seed(5)
        loss = model(start, times, told=lambda k, vectors=vectors: vectors[:, k - 1]).square().sum()
        found.append(torch.autograd.grad(loss, [leaf, *model.parameters()]))
    for ours, theirs in zip(*found):
        assert ours.any() and (ours - theirs).norm() < 1e-4 * ours.norm()
