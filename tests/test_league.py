"""The league of small systems: its table, budgets, going on after a stop, and what it writes."""

import json
import os
import shutil
import signal
import time
from dataclasses import replace

import pytest
import torch
import yaml
from test_compare import make_result
from tiny_experiment import BENCHMARKS, EXPERIMENT, Started, finished

from latentcast import load_config
from latentcast.zoo import read_examples


@pytest.fixture
def league(benchmark_module):
    return benchmark_module("league")


def test_the_shipped_table_composes(league):
    runs, titles = league.read_table(BENCHMARKS / "league.yaml")
    assert titles.keys() == {"small_smmnist", "small_flow", "masked_parts", "lvt_parts"}
    assert len({run.name for run in runs}) == len(runs)
    for run in runs:
        assert run.cpu_seconds >= (2 if run.table == run.protocol else 0.8) * 3600
        assert sum(run.stages().values()) == pytest.approx(1) and run.stages()["prior"] > 0.5
        config = load_config(run.experiment, [*run.overrides, f"protocol={run.protocol}"], tool="train_prior")
        trained = config.tokenizer._target_ != "latentcast.PixelTokenizer"
        assert trained == bool(run.tokenizer) and config.protocol.name == run.protocol
        if run.tokenizer_of:
            (source,) = (other for other in runs if other.name == run.tokenizer_of)
            budgets = [each.tokenizer * each.cpu_seconds for each in (source, run)]
            assert source.experiment == run.experiment and budgets[0] == pytest.approx(budgets[1], rel=0.01)
            assert not source.tokenizer_of and not source.joint  # so that its tokenizer is kept, as it was trained


def test_what_papers_say_beside_what_runs_say(league, benchmark_module, tmp_path):
    claims = benchmark_module("claims")
    runs, _ = league.read_table(BENCHMARKS / "league.yaml")
    shipped = claims.read_claims(BENCHMARKS / "league.yaml", runs)
    assert {claim.paper for claim in shipped} > {"HAF-SVG", "STDiff", "S-HR-VQVAE"}
    good, bad = make_result(noise=0.05), make_result(noise=0.1)
    good["metrics"]["fvd"], bad["metrics"]["fvd"] = ({"mean": value, "ci95": None} for value in (50.0, 60.0))
    results = {"good": good, "bad": bad, "same": good}

    def told(better, than, metrics=("psnr", "ssim"), **options):
        claim = claims.Claim("A paper", "it is better", list(better), list(than), list(metrics), **options)
        return claim.verdict(results)

    verdict, differences = told(["good"], ["bad"])
    assert verdict == "**confirmed** (1 seed)" and "PSNR +6.0" in differences and "SSIM +" in differences
    assert told(["bad"], ["good"])[0] == "**the opposite** (1 seed)"
    assert told(["same"], ["good"])[0] == "**not confirmed** (1 seed)"
    assert told(["good"], ["bad"], ["fvd"]) == ("**confirmed** (1 seed)", "FVD -10")
    assert told(["good", "bad"], ["bad", "good"])[0] == "**not confirmed** (2 seeds)"  # the second seed
    assert told(["good"], ["missing"]) == (claims.OPEN, "")
    for pair, verdict in ((("same", "good"), "confirmed"), (("bad", "good"), "the opposite")):
        assert told(*([name] for name in pair), no_worse=True)[0] == f"**{verdict}** (1 seed)"
    lines = claims.section([claims.Claim("A paper", "a word", why="it is large")], results)
    assert "| A paper | a word | not decidable here: it is large |  |" in lines
    (tmp_path / "table.yaml").write_text(yaml.safe_dump({"claims": [{"paper": "A", "says": "B", "better": ["no"]}]}))
    with pytest.raises(SystemExit, match="claims: B: expected names of runs, found no"):
        claims.read_claims(tmp_path / "table.yaml", runs)


def write_table(folder):
    """A table of one small run over pixels."""
    data = EXPERIMENT["data"] | {"video_length": 15}
    prior = {"_target_": "latentcast.RecurrentVAE", "hidden_channels": 4, "dim": 8, "cells": 8, "aligner": "none"}
    settings = {"frame_size": 32, "clip_length": 15, "n_context": 5, "ema_decay": 0, "data": data, "prior": prior}
    settings |= {"defaults": EXPERIMENT["defaults"] | {"tokenizer": "pixel"}, "tokenizer": {"levels": None}}
    (folder / "tiny.yaml").write_text(yaml.safe_dump(EXPERIMENT | settings))
    run = {"experiment": str(folder / "tiny.yaml"), "label": "Tiny"}
    run["evaluate"] = ["protocol.n_clips=2", "protocol.n_samples=2", "protocol.frame_size=32", "protocol.best_of=[]"]
    run["evaluate"] += ["protocol.metrics=[psnr,crps]"]
    run["sweep"] = {"sample_batch": [1, 128]}
    run["evaluate"] += ["evaluation.baselines=[copy_last_frame]", *(f"data.{k}={v}" for k, v in data.items())]
    table = {"title": "A digit", "data": "moving_digits", "zoo": "digits", "licence": "MIT (data: drawn)"}
    tables = {"one_digit": table | {"runs": {"tiny": run}}}
    (folder / "table.yaml").write_text(yaml.safe_dump({"cpu_hours": 30 / 3600, "tables": tables}))
    return folder / "table.yaml"


def started(folder, *options):
    places = "--root", folder / "runs", "--output", folder / "league.md", "--zoo", folder / "zoo"
    return Started(BENCHMARKS / "league.py", "--table", folder / "table.yaml", *places, *options, cwd=folder)


def test_a_budget_becomes_steps_by_what_a_step_costs(league, tmp_path, monkeypatch):
    (run,), _ = league.read_table(write_table(tmp_path))
    trainer, limits = league.Trainer(run, tmp_path / "runs", [], tmp_path / "kept", tmp_path / "zoo"), []

    def train(tool, extra, limit):
        limits.append((tool, int(limit[0].partition("=")[2])))
        return 7.0 + 0.25 * limits[-1][1]  # seconds: to start, and for each step

    monkeypatch.setattr(trainer, "_tool", train)
    fit = trainer._steps_within("prior", run.cpu_seconds)
    assert [tool for tool, _ in limits] == ["train_prior"] * 2 and limits[0][1] < limits[1][1]
    assert fit == (30 - 7 - 0.25 * limits[0][1]) / 0.25  # what the trials' start cost is left out of it


def test_a_tokenizer_serves_other_runs_as_soon_as_it_is_trained(league, tmp_path):
    (run,), _ = league.read_table(write_table(tmp_path))
    run = replace(run, name="second", tokenizer_of="first", tokenizer=0.2)
    trainer = league.Trainer(run, tmp_path / "runs", [], tmp_path / "kept", tmp_path / "zoo")
    state, cost = tmp_path / "runs/first/league.json", tmp_path / "kept/first/cost.json"
    for path, told in ((state, {"tokenizer": {"cpu_seconds": 1}}), (cost, None)):
        path.parent.mkdir(parents=True)
        if told:
            path.write_text(json.dumps(told))
    with pytest.raises(SystemExit, match="second: tokenizer_of: first has not trained it yet"):
        trainer.work()
    cost.write_text(json.dumps({"tokenizer": {"cpu_seconds": 3}}))
    assert trainer._other_tokenizer() == (tmp_path / "zoo/digits-first", {"cpu_seconds": 3})
    (tmp_path / "kept/first/tokenizer").mkdir()  # of a pipeline that is too large for the zoo
    assert trainer._other_tokenizer() == (tmp_path / "kept/first/tokenizer", {"cpu_seconds": 3})
    state.write_text(json.dumps({"tokenizer": {"cpu_seconds": 2, "done": True}}))
    assert trainer._other_tokenizer() == (tmp_path / "runs/first/tokenizer", {"cpu_seconds": 2, "done": True})


def test_a_run_that_is_stopped_goes_on_and_is_rendered(tmp_path):
    write_table(tmp_path)
    folder = tmp_path / "runs" / "tiny"
    folder.mkdir(parents=True)
    state, checkpoint = folder / "league.json", folder / "prior_training" / "last.ckpt"
    state.write_text(json.dumps({"prior": {"max_steps": 10_000, "cpu_seconds": 100.0}}))
    league = started(tmp_path)
    rows = folder / "metrics" / "prior.csv"  # there before the first step is
    while not (rows.is_file() and "train/loss" in rows.read_text()) and league.poll() is None:
        time.sleep(0.1)
    os.kill(league.pid, signal.SIGTERM)
    status, _, err = finished(league)
    assert status == 1 and "stopped; the same command goes on" in err and checkpoint.is_file()
    before = json.loads(state.read_text())
    assert "done" not in before["prior"] and 101 < before["prior"]["cpu_seconds"] < 200
    step = torch.load(checkpoint, weights_only=True)["global_step"]

    status, figures, err = finished(started(tmp_path))  # the tools are new interpreters, as in the league's own use
    assert status == 0, err
    assert figures["output"].endswith("league.md")
    after = json.loads(state.read_text())
    assert after["prior"]["max_steps"] == step  # its 30 seconds are over
    assert after["prior"]["done"] and before["prior"]["cpu_seconds"] + 1 < after["prior"]["cpu_seconds"] < 300
    text = (tmp_path / "league.md").read_text()
    assert "## A digit" in text and "| Tiny | " in text and "| copy last frame | " in text
    assert "![best clips](league/tiny/best.png)" in text and (tmp_path / "league" / "tiny" / "best.png").is_file()
    assert after["cost"]["calls_a_frame"] == 1 and after["cost"]["parameters"] > 1000
    clips = read_examples(tmp_path / "zoo" / "digits-tiny")
    assert clips.shape == (8, 15, 1, 32, 32)
    assert "### Tiny: sample_batch" in text and "| `sample_batch=1` | " in text
    named = ("result", "sample_batch_1", "sample_batch_128")  # the last is the default
    row, one, same = (json.loads((tmp_path / f"league/tiny/{name}.json").read_text()) for name in named)
    assert same["metrics"] == row["metrics"] and one["cost"]["seconds_a_future"] > 0
    assert one["metrics"]["psnr"]["mean"] == pytest.approx(row["metrics"]["psnr"]["mean"], abs=0.1)
    assert (tmp_path / "league" / "one_digit_tradeoff.png").is_file()
    assert "license: mit" in (tmp_path / "zoo" / "digits-tiny" / "README.md").read_text()

    shutil.rmtree(tmp_path / "runs")  # what is kept is all that the tables need
    (tmp_path / "league.md").unlink()
    status, _, err = finished(started(tmp_path, "--only", "tiny"))  # all is done: it is rendered, nothing is trained
    assert status == 0 and "train_prior" not in err
    assert (tmp_path / "league.md").read_text() == text


def test_unknown_runs_are_refused(tmp_path):
    write_table(tmp_path)
    status, _, err = finished(started(tmp_path, "--only", "tini"))
    assert status == 1 and "--only: expected some of tiny, found tini" in err
