"""benchmarks/training.py at tiny size."""

import pytest
from tiny_experiment import tiny_config, write_experiment

from latentcast import instantiate


@pytest.mark.parametrize("stage", ["tokenizer", "prior"])
def test_a_step_and_what_is_around_it(tmp_path, monkeypatch, benchmark_module, stage):
    training = benchmark_module("training")
    monkeypatch.setattr(training, "MODELS", {"tiny": (stage, str(write_experiment(tmp_path)), 2, 2)})
    found = training.measure("tiny", "plain")
    assert (found["precision"], found["batch"]) == ("32-true", 2)
    assert found["model_s"] > 0 and 0 < found["wait_s"] < found["step_s"]
    assert found["clips_per_s"] == pytest.approx(2 / found["step_s"]) and found["peak_mib"] > 100
    config = tiny_config(tmp_path)
    model = tokenizer = instantiate(config.tokenizer)
    if stage == "prior":
        model = instantiate(config.prior, latent_spec=tokenizer.latent_spec)
    assert found["parameters"] == sum(parameter.numel() for parameter in model.parameters())
    assert found["gflop"] > 2 * 3 * found["parameters"] / 1e9  # each weight is used at least once each way
