"""The benchmarks' frame: choosing parts, and the line that ends stdout."""

import json
import sys

import pytest


@pytest.fixture
def run_parts(benchmark_module):
    return benchmark_module("common").run_parts


def test_last_line_holds_ratios_and_machine(run_parts, monkeypatch, capsys):
    ran = []
    parts = {name: lambda name=name: ran.append(name) or {f"{name}_ratio": 2.345} for name in "abc"}
    monkeypatch.setattr(sys, "argv", ["benchmark", "--only", "c,a"])
    run_parts("", parts)
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert ran == ["c", "a"] and found["ratios"] == {"c_ratio": 2.35, "a_ratio": 2.35}
    assert {"cpu", "threads", "torch", "gpu"} <= found["env"].keys()


def test_unknown_part_is_refused(run_parts, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["benchmark", "--only", "b"])
    with pytest.raises(SystemExit) as caught:
        run_parts("", {"a": dict})
    assert caught.value.code == 2 and "unknown part 'b'" in capsys.readouterr().err


def test_lvt_ratios_at_tiny_size(monkeypatch, run_parts):
    """The slow side is measured for real; a cached video of 1 ms and 16 of them in 4 ms stand in for the fast one."""
    import sampling_lvt

    monkeypatch.setattr(sampling_lvt, "lvt_cached", lambda model, n_samples, device: {1: 1e-3, 16: 4e-3}[n_samples])
    model = sampling_lvt.VideoTransformer(
        sampling_lvt.LVT_SPEC | {"scaling_factor": 1.0}, dim=8, embed_dim=8, n_heads=1, head_dim=8, n_layers=1
    )
    ratios = sampling_lvt.lvt_ratios(model.eval(), "cpu", measured=2)
    assert ratios["lvt_cached_b16"] == pytest.approx(4 * ratios["lvt_cached_b1"])
    assert ratios["lvt_cached_b1"] > 1000 and ratios["lvt_cached_b16_same_batch"] > 0
