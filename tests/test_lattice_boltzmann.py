"""The lattice-Boltzmann solver against physics: conservation, closed-form flows, momentum budgets, compiled or not."""

import os
import shutil
import sysconfig

import pytest
import torch

from latentcast.data.sets.lattice_boltzmann import (
    LatticeBoltzmann,
    disc,
    dominant_frequency,
    strouhal_number,
    williamson_strouhal,
)

COMPILES = shutil.which(os.environ.get("CXX", "g++")) and os.path.exists(
    os.path.join(sysconfig.get_paths()["include"], "Python.h")
)


def walls(height, width):
    solid = torch.zeros(height, width, dtype=torch.bool)
    solid[0] = solid[-1] = True
    return solid


def _messages(caplog):
    return [record.getMessage() for record in caplog.records if record.name == "latentcast"]


def swirl(height, width, speed=0.05):
    """(2, height, width): a smooth velocity that goes both ways along both axes."""
    y, x = torch.meshgrid(torch.arange(height) / height, torch.arange(width) / width, indexing="ij")
    return speed * torch.stack([torch.sin(2 * torch.pi * (y + x)) + 0.3, torch.cos(2 * torch.pi * (2 * x - y)) - 0.2])


def test_mass_is_conserved_in_a_closed_box():
    solid = walls(24, 31) | disc(24, 31, 12.3, 10.8, 7)
    solid[:, 0] = solid[:, -1] = True
    solver = LatticeBoltzmann(solid, viscosity=0.02)
    solver.start(swirl(24, 31))
    solver.advance(100)
    assert solver.density().abs().max() > 1e-4, "nothing moves"
    solver.advance(4000)
    assert abs(solver.density().double().sum()) / (~solid).sum() < 1e-7


def test_fluid_does_not_cross_walls():
    solid = walls(20, 16)
    solid[9:11] = True
    solver = LatticeBoltzmann(solid, viscosity=0.05)
    velocity = torch.zeros(2, 20, 16)
    velocity[:, 1:9] = swirl(8, 16)
    solver.start(velocity)
    solver.advance(60)
    assert solver.velocity()[:, 1:9].abs().max() > 1e-3
    assert solver.velocity()[:, 9:].abs().max() == 0 and solver.density()[9:].abs().max() == 0


@pytest.mark.parametrize("viscosity", [0.03, 0.1, 0.25])
def test_a_force_drives_a_parabolic_profile_between_two_walls(viscosity):
    rows, peak = 20, 0.04
    force = 8 * viscosity * peak / rows**2
    solver = LatticeBoltzmann(walls(rows + 2, 3), viscosity, force=force)
    solver.advance(int(3 * rows**2 / viscosity / 4))
    y = torch.arange(rows) + 0.5  # walls are half-way between cells
    expected = force / (2 * viscosity) * y * (rows - y)
    found = solver.velocity()[0, 1:-1, 1]
    assert (found - expected).norm() / expected.norm() < 0.01
    assert (found - expected).abs().max() / peak < 0.01
    assert solver.velocity()[1].abs().max() < 1e-6


@pytest.mark.parametrize("axis", [0, 1])
def test_a_shear_wave_decays_at_the_rate_of_its_viscosity(axis):
    n, viscosity, ticks = 48, 0.03, 600
    wave = 0.02 * torch.sin(2 * torch.pi * torch.arange(n) / n)
    velocity = torch.zeros(2, n, n)
    velocity[axis] = wave[:, None] if axis == 0 else wave
    solver = LatticeBoltzmann(torch.zeros(n, n, dtype=torch.bool), viscosity)
    solver.start(velocity)
    solver.advance(ticks)
    decay = torch.exp(torch.tensor(-viscosity * (2 * torch.pi / n) ** 2 * ticks))
    assert 0.6 < decay < 0.8
    torch.testing.assert_close(solver.velocity(), velocity * decay, atol=1e-4, rtol=0)


def test_force_on_solids_is_the_momentum_that_the_fluid_loses():
    solver = LatticeBoltzmann(disc(30, 40, 17.4, 13.2, 9), viscosity=0.02)
    solver.start(swirl(30, 40))
    for _ in range(5):
        solver.advance(7)
        force = solver.force_on_solids()
        before = ((1 + solver.density()) * solver.velocity()).double().sum((1, 2))
        solver.advance(1)
        after = ((1 + solver.density()) * solver.velocity()).double().sum((1, 2))
        assert force.abs().min() > 1e-3
        torch.testing.assert_close((before - after).float(), force, atol=2e-5, rtol=1e-3)


def test_solids_across_the_periodic_edge_are_one_body():
    """Moving everything around the periodic box moves the flow with it."""
    solid, velocity = disc(24, 24, 12, 12, 8), swirl(24, 24)
    here, there = LatticeBoltzmann(solid, 0.02), LatticeBoltzmann(solid.roll((12, 11), (0, 1)), 0.02)
    here.start(velocity)
    there.start(velocity.roll((12, 11), (1, 2)))
    for solver in (here, there):
        solver.advance(200)
    torch.testing.assert_close(there.velocity(), here.velocity().roll((12, 11), (1, 2)), atol=1e-6, rtol=0)
    torch.testing.assert_close(there.force_on_solids(), here.force_on_solids(), atol=1e-5, rtol=0)


def test_a_uniform_stream_stays_uniform_from_inflow_to_outflow():
    solver = LatticeBoltzmann(torch.zeros(8, 50, dtype=torch.bool), viscosity=0.01, inflow=0.07)
    solver.advance(500)
    assert (solver.velocity()[0] - 0.07).abs().max() < 1e-6
    assert solver.velocity()[1].abs().max() < 1e-6 and solver.density().abs().max() < 1e-5


def test_sound_leaves_at_the_outflow():
    velocity = torch.zeros(2, 8, 120)
    velocity[0] = 0.05 + 0.03 * torch.exp(-(((torch.arange(120) - 60) / 6.0) ** 2))
    solver = LatticeBoltzmann(torch.zeros(8, 120, dtype=torch.bool), viscosity=0.01, inflow=0.05)
    solver.start(velocity)
    solver.advance(40)
    loud = solver.density().abs().max()
    assert loud > 0.02
    solver.advance(110)  # what the right edge threw back would be around column 95, what the left one did around 22
    assert solver.density()[:, 60:].abs().max() < 0.03 * loud


def test_the_inflow_enters_as_given():
    solver = LatticeBoltzmann(torch.zeros(16, 30, dtype=torch.bool), viscosity=0.05, inflow=0.05)
    wave = torch.sin(2 * torch.pi * torch.arange(16) / 16)
    inflow = torch.stack([0.05 + 0 * wave, 0.01 * wave]).expand(400, 2, 16)
    solver.advance(400, inflow)
    first = solver.velocity()[:, :, 0]
    assert torch.corrcoef(torch.stack([first[1], wave]))[0, 1] > 0.99
    assert 0.005 < first[1].max() < 0.011
    still = LatticeBoltzmann(torch.zeros(16, 30, dtype=torch.bool), viscosity=0.05, inflow=0.05)
    still.advance(400)
    assert still.velocity()[1].abs().max() < 1e-6


def test_vorticity_is_the_curl_of_the_velocity():
    n = 64
    y, x = torch.meshgrid(torch.arange(n) * 2 * torch.pi / n, torch.arange(n) * 2 * torch.pi / n, indexing="ij")
    solver = LatticeBoltzmann(torch.zeros(n, n, dtype=torch.bool), viscosity=0.1)
    solver.start(0.02 * torch.stack([torch.sin(2 * y) * torch.cos(x), torch.cos(3 * x) * torch.sin(y)]))
    k = 2 * torch.pi / n
    expected = 0.02 * k * (-3 * torch.sin(3 * x) * torch.sin(y) - 2 * torch.cos(2 * y) * torch.cos(x))
    error = solver.vorticity() - expected
    assert error[:, 1:-1].abs().max() < 0.02 * expected.abs().max()
    assert error.abs().max() < 0.3 * expected.abs().max()  # one-sided differences at the edges


def test_a_disc_holds_the_cells_inside_it():
    solid = disc(9, 12, 6, 3, 4.2)
    assert solid.shape == (9, 12) and solid.sum() == 13  # the centre, 8 around it, 4 two cells away
    assert solid[3, 8] and solid[1, 6] and not solid[3, 9] and not solid[1, 5]


@pytest.mark.parametrize("frequency", [0.00931, 0.0123, 0.021])
def test_the_frequency_of_a_sine_is_found_between_the_bins(frequency):
    time = torch.arange(100) * 8.0
    signal = 3 + 0.2 * torch.sin(2 * torch.pi * frequency * time + 0.7)
    assert dominant_frequency(signal, 8) == pytest.approx(frequency, rel=2e-3)
    assert strouhal_number(signal, 8, diameter=10, speed=0.5) == pytest.approx(20 * frequency, rel=2e-3)


def test_williamsons_fit_has_his_values():
    assert williamson_strouhal(100) == pytest.approx(0.164, abs=5e-4)
    assert williamson_strouhal(150) == pytest.approx(0.183, abs=5e-4)


@pytest.mark.skipif(not COMPILES, reason="no C++ compiler or no headers of Python")
def test_compiled_and_plain_agree(caplog, unchecked):
    solid, velocity = disc(32, 48, 12.2, 15.7, 6), 0.05 + swirl(32, 48, 0.02)
    fields = []
    for compile in (False, True):
        for viscosity in (0.01, 0.02):
            solver = LatticeBoltzmann(solid, viscosity, inflow=0.05, compile=compile)
            solver.start(velocity)
            solver.advance(300)
            fields.append(solver.velocity())
    assert not _messages(caplog)
    assert (fields[0] - fields[1]).abs().max() > 1e-3
    torch.testing.assert_close(fields[2], fields[0], atol=2e-6, rtol=0)
    torch.testing.assert_close(fields[3], fields[1], atol=2e-6, rtol=0)


def test_without_a_compiler_it_warns_and_runs_plainly(caplog, monkeypatch, tmp_path, unchecked):
    from torch._inductor import config

    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    solid = disc(20, 37, 8, 9, 5)
    torch.compiler.reset()
    with config.patch({"cpp.cxx": (None, "no-such-compiler")}):
        compiled = LatticeBoltzmann(solid, 0.01, inflow=0.05, compile=True)
        compiled.advance(20)
    torch.compiler.reset()
    (message,) = _messages(caplog)
    assert "torch.compile does not work here" in message and "\n" not in message
    plain = LatticeBoltzmann(solid, 0.01, inflow=0.05)
    plain.advance(20)
    assert torch.equal(compiled.velocity(), plain.velocity())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"viscosity": 0.001}, r"viscosity: expected at least 0\.00167 .*found 0\.00100 \(0\.5030\)"),
        ({"viscosity": float("nan")}, "viscosity: expected"),
        ({"inflow": 0.3}, r"inflow: expected a speed of 0 to 0\.15 cells a tick, found 0\.3"),
        ({"inflow": -0.1}, "inflow: expected"),
        ({"solid": torch.zeros(4, 5)}, r"solid: expected \(H, W\) bool, found \(4, 5\) torch\.float32"),
    ],
)
def test_bad_parameters_end_in_one_line(change, message):
    good = {"solid": torch.zeros(4, 5, dtype=torch.bool), "viscosity": 0.01}
    with pytest.raises(ValueError, match=message) as error:
        LatticeBoltzmann(**(good | change))
    assert "\n" not in str(error.value)


def test_a_flow_that_blows_up_names_the_tick():
    solver = LatticeBoltzmann(torch.zeros(8, 8, dtype=torch.bool), viscosity=0.002)
    solver.start(swirl(8, 8, speed=5))
    with pytest.raises(FloatingPointError, match=r"^tick 500: the flow blew up"):
        solver.advance(500)
