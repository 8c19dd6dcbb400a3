"""Results side by side: what compares, what is refused, published figures in our units, and plots that show them."""

import argparse
import json
import os
import runpy

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import save_file
from tiny_experiment import TOOLS, Started

from latentcast import Protocol, figures, load_config
from latentcast.cli import UserError
from latentcast.config import instantiate
from latentcast.evaluation.comparison import differences, paired
from latentcast.evaluation.published import PUBLISHED, published_beside, read_published
from latentcast.evaluation.results import read_result
from latentcast.metrics import BestOfN, crps, mse
from latentcast.metrics.statistics import ClipValues, paired_bootstrap

N_CLIPS, T = 12, 3


def metrics_of(noise, seed, n_samples):
    """Real metrics of samples that are the truth and noise."""
    generator = torch.Generator().manual_seed(99)
    target = 0.8 * torch.rand(N_CLIPS, T, 1, 16, 16, generator=generator) - 0.4
    generator.manual_seed(seed)
    scale = noise * torch.linspace(1, 2, T).view(T, 1, 1, 1)
    samples = target[:, None] + scale * torch.randn(N_CLIPS, n_samples, T, 1, 16, 16, generator=generator)
    samples = samples.clamp(-1, 1)
    best_of_n = BestOfN(("mse", "psnr", "ssim"), [n for n in (1, 2) if n < n_samples])
    best_of_n.update(samples, target)
    values = ClipValues()
    values.update(crps(samples, target))
    fvd = {"mean": 1000 * noise, "ci95": None, "n_real": N_CLIPS, "n_fake": N_CLIPS, "debiased": None}
    return best_of_n.compute() | {"crps": values.compute(), "fvd": fvd}


def make_result(name="A", noise=0.05, seed=0, data="smmnist", **changes):
    """What tools/evaluate.py writes."""
    fields = {"n_context": 5, "n_predicted": 10, "n_samples": 4, "metrics": ["mse", "psnr", "ssim", "crps", "fvd"]}
    protocol = Protocol(name="tiny", **(fields | {"best_of": [1, 2]} | changes))
    describe = {"type": "PreparedVideos", "name": data, "protocol": {"protocol": "svg"}, "sha256": "5" * 64}
    result = {
        "protocol": {"name": "tiny", "source": "ours"} | protocol.describe(),
        "data": {"name": data, "protocol": {"protocol": "svg"}, "split": "test", "n_clips": N_CLIPS},
        "detector": {"fvd": "f" * 64, "lpips": None},
        "model": {"name": name},
        "metrics": metrics_of(noise, seed, protocol.n_samples),
        "baselines": {"copy_last_frame": metrics_of(0.3, 1, 1)},
    }
    result["data"] |= {"sha256": data + "0" * 50, "describe": describe}
    return json.loads(json.dumps(result))


def write(folder, name, result):
    path = folder / name
    path.write_text(json.dumps(result))
    return path


def compare(*paths, **options):
    """The tool's ``main`` in this process; errors are raised."""
    given = {"output": None, "published": False, "force": False, "labels": None} | options
    main = runpy.run_path(str(TOOLS / "compare.py"))["main"]
    return main(argparse.Namespace(results=list(paths), **given))


def run(*arguments):
    process = Started(TOOLS / "compare.py", *arguments, cwd=TOOLS.parent)
    out, err = process.communicate(timeout=150)
    return process.returncode, out, err


def test_two_runs_stand_side_by_side_with_their_differences(tmp_path):
    a, b = make_result("A", 0.05, 0), make_result("B", 0.1, 1)
    for place, metrics in enumerate((a["metrics"], a["baselines"]["copy_last_frame"], b["metrics"])):
        metrics["fvd"]["debiased"] = 10.0 + place
    paths = write(tmp_path, "a.json", a), write(tmp_path, "b.json", b)
    status, out, err = run(*paths, "--output", tmp_path / "out")
    assert status == 0, err
    found = json.loads(out.splitlines()[-1])
    assert found["results"]["B"]["ssim"]["mean"] == b["metrics"]["ssim"]["mean"]
    assert found["unlike"] == {}
    by_metric = found["differences"]["B"]
    assert by_metric.keys() == {"mse", "psnr", "ssim", "crps"}  # fvd has no pairs
    for metric, difference in by_metric.items():
        rows = np.subtract(b["metrics"][metric]["per_clip"], a["metrics"][metric]["per_clip"])
        assert difference["difference"] == pytest.approx(rows.mean())
        half = 1.96 * rows.std(ddof=1) / N_CLIPS**0.5
        assert np.ptp(difference["ci95"]) / 2 == pytest.approx(half, rel=0.25)
    assert by_metric["psnr"]["ci95"][1] < 0 < by_metric["mse"]["ci95"][0]  # B is worse

    table = (tmp_path / "out/comparison.md").read_text()
    assert table.strip() in err
    lines = table.splitlines()
    assert lines[0] == "|  | A | B | copy_last_frame |"
    psnr = next(line for line in lines if line.startswith("| PSNR"))
    assert f"{a['metrics']['psnr']['mean']:.4g} ±" in psnr and f"{b['metrics']['psnr']['mean']:.4g} ±" in psnr
    assert "fvd, extrapolated to infinitely many videos: A 10, B 12, copy_last_frame 11." in lines
    curves = {f"curves_{metric}" for metric in ("mse", "psnr", "ssim", "crps", "inverse_crps")}
    assert found["files"].keys() == {"table", *curves, *(f"ablation_{metric}" for metric in ("mse", "psnr", "ssim"))}
    for path in found["files"].values():
        assert path.endswith(".md") or Image.open(path).size[0] >= 500


@pytest.mark.parametrize(
    "change, message",
    [
        ({"n_context": 2}, "n_context 5 and 2 "),
        ({"n_samples": 5, "split": "val"}, "n_samples 4 and 5; split test and val "),
        ({"ssim": "uniform"}, "ssim gaussian and uniform "),
        ({"data": "bair"}, "data.name smmnist and bair"),
    ],
)
def test_unlike_protocols_and_data_are_refused_with_both_sides(tmp_path, change, message):
    paths = write(tmp_path, "a.json", make_result()), write(tmp_path, "b.json", make_result("B", **change))
    with pytest.raises(UserError) as error:
        compare(*paths)
    assert f"{paths[0]} does not compare with {paths[1]}: " in str(error.value) and message in str(error.value)


def test_all_that_differs_is_listed():
    a, b = make_result(), make_result(n_context=2, n_predicted=28)
    b["detector"]["fvd"] = "e" * 64
    b["data"]["sha256"] = "1"
    assert differences(a, a) == {}
    assert differences(a, b) == {
        "n_context": (5, 2),
        "n_predicted": (10, 28),
        "detector.fvd": ("f" * 64, "e" * 64),
        "data.clips": ("smmnist" + "0" * 50, "1"),
    }
    b["protocol"] |= {"name": "another", "source": "another", "n_context": 5, "n_predicted": 10}
    assert differences(a, b).keys() == {"detector.fvd", "data.clips"}  # names and sources may differ


def test_unlike_results_are_one_line_on_stderr(tmp_path, command):
    paths = write(tmp_path, "a.json", make_result()), write(tmp_path, "b.json", make_result("B", n_context=2))
    status, figures, err = command("compare", *paths)
    assert status == 1 and figures is None and err.count("\n") == 1
    assert err.startswith("error: ") and "n_context 5 and 2" in err and "--force" in err


def test_forced_columns_are_labelled(tmp_path, capsys, caplog):
    paths = write(tmp_path, "a.json", make_result()), write(tmp_path, "b.json", make_result("B", n_context=2))
    found = compare(*paths, force=True, output=tmp_path / "out")
    assert found["unlike"] == {"B": {"n_context": (5, 2)}}
    assert found["differences"] == {"B": {}}  # other frames
    assert "no differences: they share no metric that each of several videos has" in caplog.text
    table = (tmp_path / "out/comparison.md").read_text()
    assert "| A | B [1] | copy_last_frame |" in table
    assert "[1] does not compare with A: n_context 5 and 2" in table
    assert table in capsys.readouterr().out


def test_options_of_other_splits_do_not_differ():
    results = a, b, c = make_result(), make_result(), make_result()
    options = {"n_train": 8000, "n_test": 256}, {"n_train": 4000, "n_test": 256}, {"n_train": 8000, "n_test": 64}
    for result, prepared in zip(results, options):
        result["data"]["describe"]["protocol"] |= prepared
    assert differences(a, b) == {} and paired(a, b).keys() == {"mse", "psnr", "ssim", "crps"}
    assert differences(a, c) == {"data.protocol.n_test": (256, 64)}


def test_only_equal_clips_under_equal_settings_are_paired():
    a = make_result()
    assert paired(a, make_result(n_samples=5)).keys() == {"mse", "psnr", "ssim", "crps"}
    assert paired(a, make_result(ssim="uniform")).keys() == {"mse", "psnr", "crps"}
    assert paired(a, make_result(crps="fair")).keys() == {"mse", "psnr", "ssim"}
    assert paired(a, make_result(split="val")) == paired(a, make_result(data="bair")) == {}
    other = make_result()
    other["metrics"]["mse"]["clips"][0] = 77
    assert "mse" not in paired(a, other)


def test_differences_are_drawn_by_video():
    """Twelve clips of four videos; a result from before videos were kept takes them from the other."""
    a, b = make_result("A", 0.05, 0), make_result("B", 0.06, 1)
    by_clip = paired(a, b)["mse"]
    videos = [clip // 3 for clip in range(N_CLIPS)]
    for entry in b["metrics"].values():
        entry.update(videos=videos) if "videos" in entry else None
    assert paired(a, b)["mse"]["n_videos"] == 4
    for entry in a["metrics"].values():
        entry.pop("videos", None)
    found = paired(a, b)["mse"]
    expected = paired_bootstrap(b["metrics"]["mse"]["per_clip"], a["metrics"]["mse"]["per_clip"], videos=videos)
    assert found == expected and found["p_value"] >= 0.125 > by_clip["p_value"]
    for entry in b["metrics"].values():
        entry.update(videos=[5] * N_CLIPS) if "videos" in entry else None
    assert paired(a, b) == {}


def damaged(change):
    result = make_result()
    change(result)
    return json.dumps(result)


@pytest.mark.parametrize(
    "text, message",
    [
        ("", "not valid JSON"),
        (damaged(lambda r: None)[:900], "not valid JSON"),
        ("[1, 2]", "expected a JSON object, found list"),
        ('{"name": "something", "metrics": {}}', "protocol: expected, found nothing"),
        (damaged(lambda r: r["protocol"].pop("n_samples")), "protocol.n_samples: expected, found nothing"),
        (damaged(lambda r: r.update(metrics={})), "metrics: expected at least 1 entries, found 0"),
        (damaged(lambda r: r["metrics"]["psnr"].update(mean=float("nan"))), "not valid JSON .NaN is no number"),
        (damaged(lambda r: r["metrics"]["psnr"].pop("ci95")), "metrics.psnr.ci95: expected, found nothing"),
        (
            damaged(lambda r: r["metrics"]["psnr"].update(ci95=[1])),
            "metrics.psnr.ci95: expected at least 2 entries, found 1",
        ),
        (damaged(lambda r: r["metrics"]["psnr"].update(ci95=True)), "metrics.psnr.ci95: expected a list, found True"),
        (
            damaged(lambda r: r["metrics"]["psnr"].update(mean="20.1")),
            "metrics.psnr.mean: expected a number, found '20",
        ),
        (damaged(lambda r: r["protocol"].update(n_context=True)), "n_context: expected a whole number, found True"),
        (
            damaged(lambda r: r["metrics"]["psnr"].update(best_of=[1])),
            "metrics.psnr.best_of: expected an object, found",
        ),
        (
            damaged(lambda r: r["metrics"]["psnr"].update(per_frame=3)),
            "metrics.psnr.per_frame: expected a list, found 3",
        ),
        (damaged(lambda r: r["metrics"]["psnr"].pop("per_clip")), "per_clip and clips of one length, found 0 and 12"),
        (damaged(lambda r: r["model"].update(name=5)), "model.name: expected text, found 5"),
        (damaged(lambda r: r["data"].update(describe=None)), "data.describe: expected an object, found None"),
        (damaged(lambda r: r["data"].update(protocol="svg")), "data.protocol: expected an object, found 'svg'"),
        (damaged(lambda r: r["metrics"]["mse"]["per_clip"].pop()), "per_clip and clips of one length, found 11 and 12"),
        (damaged(lambda r: r["metrics"]["mse"]["videos"].pop()), "videos and clips of one length, found 11 and 12"),
        (damaged(lambda r: r["metrics"]["mse"]["per_frame"].pop()), "of one length, found 3 and 2"),
        (
            damaged(lambda r: r["metrics"]["mse"]["best_of"].update({"1": 3})),
            "metrics.mse.best_of.1: expected an object, found 3",
        ),
        (damaged(lambda r: r["baselines"].update(mine=1)), "baselines.mine: expected an object, found 1"),
    ],
)
def test_damaged_and_foreign_files_are_one_clear_line(tmp_path, text, message):
    path = tmp_path / "bad.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=message) as error:
        read_result(path)
    assert str(error.value).startswith(f"{path}: ") and "\n" not in str(error.value)


def test_results_of_one_name_are_called_by_their_run_folders(tmp_path):
    """What two people made of the same experiment, two runs of one person, and two protocols of one run."""
    paths = {}
    for place in ("alice/runs/lvt/metrics/tiny", "bob/runs/lvt/metrics/tiny", "bob/runs/again/metrics/tiny"):
        (tmp_path / place).parent.mkdir(parents=True)
        paths[place] = write(tmp_path, f"{place}.json", make_result())
    alice, bob, again = paths.values()
    assert list(compare(alice, bob)["results"]) == ["alice/runs/lvt", "bob/runs/lvt"]
    assert list(compare(alice, again)["results"]) == ["lvt", "again"]
    other = write(tmp_path, "alice/runs/lvt/metrics/other.json", make_result())
    assert list(compare(alice, other)["results"]) == ["tiny", "other"]
    named = write(tmp_path, "named.json", make_result("B"))
    assert list(compare(alice, named)["results"]) == ["A", "B"]


def test_missing_files_and_bad_labels_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"absent\.json: no such file"):
        compare(tmp_path / "absent.json")
    a, b = write(tmp_path, "a.json", make_result()), write(tmp_path, "b.json", make_result())
    assert compare(a, b)["results"].keys() == {"a", "b"}  # both models are called A
    assert compare(a, b, labels=["x", "y"])["results"].keys() == {"x", "y"}
    with pytest.raises(UserError, match="--labels: expected one for each of 2 results, found 1"):
        compare(a, b, labels=["x"])
    for labels in (["x", "x"], ["x", "copy_last_frame"]):
        with pytest.raises(UserError, match=f"'{labels[1]}' would name two columns"):
            compare(a, b, labels=labels)


def test_published_rows_are_in_our_units_and_say_how_their_protocol_differs(tmp_path, caplog):
    result = make_result("mine", data="smmnist", n_samples=10, frame_size=64)
    caplog.set_level("INFO")
    found = compare(write(tmp_path, "a.json", result), published=True, output=tmp_path)["published"]["smmnist"]
    (stdiff,) = [row for row in found if row["method"] == "STDiff" and "ssim" in row["metrics"]]
    assert stdiff["differs"] == {}
    assert stdiff["metrics"]["lpips"]["value"] == pytest.approx(0.1462)
    assert stdiff["metrics"]["lpips"]["printed"] == "146.2"
    (svg,) = [row for row in found if row["method"] == "SVG-LP" and row["paper"] == "field"]
    assert svg["differs"] == {"n_predicted": (20, 10), "n_samples": (100, 10)}
    table = (tmp_path / "comparison.md").read_text()
    assert "n_predicted 20, here 10; n_samples 100, here 10" in table
    line = next(line for line in table.splitlines() if line.startswith("| STDiff | 5 → 10 | 10 |") and "0.748" in line)
    assert line.endswith("| stdiff, Table 1 |  |")

    other = make_result(data="bair", n_context=1, n_predicted=15)
    rows = published_beside(read_published(PUBLISHED), other)
    lvt = next(row for row in rows if row["method"] == "LVT, single frame, n_c = 4")
    assert lvt["metrics"]["fvd"] == {"printed": "125.76 +- 2.90", "unit": "as ours", "value": 125.76, "spread": 2.9}
    assert lvt["differs"]["n_samples"] == (None, 4) and lvt["differs"]["n_context"] == (5, 1)
    assert not any(row["metrics"].keys() == {"bits"} for row in rows)  # it has no bits

    compare(write(tmp_path, "b.json", make_result(data="home_videos")), published=True)
    assert "nothing published that shares a metric and the data set home_videos" in caplog.text


def test_published_figures_of_another_rate_differ(tmp_path):
    fields = {"data": "kitti", "n_context": 4, "n_predicted": 5, "n_samples": 10, "frame_size": 128}
    for multiplier, same, other in ((1, "Table 2", "Table 4"), (2, "Table 4", "Table 2")):
        changes = fields | {"fps_multiplier": multiplier, "metrics": ["mse", "psnr", "ssim", "crps"]}
        result = make_result("mine", **changes)
        result["data"]["protocol"] = {"protocol": None}  # as the tables have it
        path = write(tmp_path, "a.json", result)
        found = compare(path, published=True, output=tmp_path)["published"]["kitti"]
        differs = {row["place"]: row["differs"] for row in found if row["method"] == "STDiff"}
        assert differs == {same: {}, other: {"fps_multiplier": (3 - multiplier, multiplier)}}
        table = (tmp_path / "comparison.md").read_text()
        assert "compares frames, their rate, samples" in table
        assert ("| **mine** | 4 → 5 at 2 times the rate | 10 |" in table) == (multiplier == 2)
        assert f"fps_multiplier {3 - multiplier}, here {multiplier}" in table
    del result["protocol"]["fps_multiplier"]  # written before there were other rates
    rows = published_beside(read_published(PUBLISHED), result)
    assert next(row for row in rows if row["place"] == "Table 2" and row["method"] == "STDiff")["differs"] == {}


def test_published_figures_stand_beside_ours_of_the_same_samples(tmp_path):
    """RVD chose no sample, STDiff the best of each clip: where both are beside ours, ours is there in both ways."""

    def rows_of(**changes):
        result = make_result("mine", n_samples=10, frame_size=64, **changes)
        result["metrics"]["lpips"] = result["metrics"]["mse"]
        found = compare(write(tmp_path, "a.json", result), published=True, output=tmp_path)["published"]
        lines = (tmp_path / "comparison.md").read_text().splitlines()
        heads = next(line for line in lines if line.startswith("|  | frames |")).split(" | ")
        rows = [dict(zip(heads, line.split(" | "))) for line in lines if line.startswith("| **mine**")]
        return result["metrics"]["lpips"], [(row["of them"], row["LPIPS ↓"]) for row in rows], found

    entry, ours, _ = rows_of(data="flow")
    mean = f"{entry['mean_of_samples']['mean']:.4g} ± "
    assert [which for which, _ in ours] == ["mean"] and ours[0][1].startswith(mean)
    entry, ours, found = rows_of(data="bair")
    best = f"{entry['mean']:.4g} ± "
    assert best != mean and [which for which, _ in ours] == ["best", "mean"]
    assert ours[0][1].startswith(best) and ours[1][1].startswith(mean)
    chosen = {(row["paper"], row["selection"]) for row in found["bair"] if "lpips" in row["metrics"]}
    assert chosen == {("stdiff", "best"), ("rvd", "mean"), ("field", "best")}
    entry, ours, _ = rows_of(data="smmnist")
    assert [which for which, _ in ours] == ["best"] and ours[0][1].startswith(best)


def test_a_published_tokenizer_stands_beside_our_reconstruction(tmp_path):
    result = make_result("mine", data="bair", n_context=5, n_predicted=11, n_samples=1, best_of=[])
    entry = {"mean": 0.0064, "ci95": [0.006, 0.0068], "n_clips": 2, "clips": [0, 1], "per_clip": [0.0063, 0.0065]}
    result["baselines"]["reconstruction"] = {"clip_mse": entry, "fvd": {"mean": 200.0, "ci95": None}}
    found = compare(write(tmp_path, "a.json", result), published=True, output=tmp_path)["published"]["bair"]
    (row,) = [row for row in found if row["method"] == "VQ-VAE, n_c = 1"]
    assert row["metrics"]["clip_mse"]["value"] == pytest.approx(0.0064)  # 4 times .0016, of frames in [0, 1]
    text = (tmp_path / "comparison.md").read_text()
    table, published = text.split("Published for bair")
    (line,) = [line for line in published.splitlines() if line.startswith("| **mine, reconstruction**")]
    assert "| 0.0064 ± 0.0004 |" in line and "| 200 |" in line
    assert "| MSE of the whole clip ↓ | – | – | 0.0064 ± 0.0004 |" in table


def test_results_from_before_a_setting_have_what_was_usual(tmp_path):
    old, new = make_result(), make_result()
    for key in ("psnr", "rounded", "fps_multiplier"):
        del old["protocol"][key]
    assert differences(old, new) == {}
    assert differences(old, make_result(rounded=True)) == {"rounded": (False, True)}
    assert paired(old, make_result(psnr="channel")).keys() == {"mse", "ssim", "crps"}
    assert paired(old, make_result(rounded=True)) == {}


def test_squared_error_of_the_moving_mnist_tables_becomes_ours():
    pictures = np.random.default_rng(0).random((2, 4, 5, 1, 64, 64))  # (2, B, T, C, H, W) in [0, 1]
    theirs = np.square(pictures[0] - pictures[1]).sum((2, 3, 4)).mean()
    ours = mse(*torch.from_numpy(2 * pictures - 1)).mean().item()
    rows = read_published(PUBLISHED)
    (row,) = [row for row in rows if row["method"] == "ConvLSTM"]
    figure = row["metrics"]["mse"]
    assert figure["value"] / float(figure["printed"]) == pytest.approx(ours / theirs)


def test_published_figures_are_whole_and_agree_with_the_presets():
    rows = read_published(PUBLISHED)
    assert {row["paper"] for row in rows} == {"lvt", "stdiff", "rvd", "field"} and len(rows) > 150
    named = [(row["paper"], row["place"], row["data"], row["method"], m) for row in rows for m in row["metrics"]]
    assert len(set(named)) == len(named)
    by_preset = {}
    for row in rows:
        if row["preset"] is not None:
            by_preset.setdefault(row["preset"], []).append(row)
    for preset, of_preset in by_preset.items():
        protocol = instantiate(load_config("quickstart", [f"protocol={preset}"]).protocol)
        assert {row["data"] for row in of_preset} == {protocol.data}
        for key in ("n_context", "n_predicted", "fps_multiplier", "frame_size", "data_protocol"):
            assert {row["protocol"][key] for row in of_preset} <= {getattr(protocol, key), None}, (preset, key)
        assert {row["protocol"]["n_samples"] for row in of_preset} & {protocol.n_samples, None}, preset
        assert {metric for row in of_preset for metric in row["metrics"]} <= {*protocol.metrics}, preset


def test_published_ranges_are_possible():
    for row in read_published(PUBLISHED):
        for metric, figure in row["metrics"].items():
            top = {"ssim": 1, "lpips": 1, "ilpips": 1, "psnr": 60, "bits": 8, "crps": 255, "mse": 4, "clip_mse": 4}
            top = {**top, "fvd": 6000}[metric]
            assert figure["value"] is None or 0 <= figure["value"] <= top, row


@pytest.mark.parametrize(
    "change, message",
    [
        (
            lambda t: t.update(units={"fdv": "as ours"}),
            r"tables\[0\].units.fdv.*: expected one of mse, .*, found 'fdv'",
        ),
        (lambda t: t.update(units={"fvd": "metres"}), "'metres' is not known"),
        (lambda t: t.update(paper="who"), "'who' is not known"),
        (lambda t: t.pop("place"), r"tables\[0\].place: expected, found nothing"),
        (lambda t: t["rows"][0].update(fvd=222.71), "VQ-VAE, n_c = 1: fvd: expected a figure as printed, in quotes"),
        (lambda t: t["rows"][0].update(fvd="222,71"), "expected a figure as printed, in quotes, found '222,71'"),
        (lambda t: t["rows"][0].update(ssim="1"), "VQ-VAE, n_c = 1: ssim: expected no such key, found '1'"),
        (lambda t: t.update(selection="worst"), r"tables\[0\].selection: expected one of best, mean.*, found 'worst'"),
        (lambda t: t.pop("selection"), r"tables\[0\].selection: expected, found nothing"),
    ],
)
def test_mistakes_in_published_figures_are_named(tmp_path, change, message):
    content = yaml.safe_load(PUBLISHED.read_text())
    change(content["tables"][0])
    path = tmp_path / "published.yaml"
    path.write_text(yaml.safe_dump(content))
    with pytest.raises(ValueError, match=message):
        read_published(path)


def test_curves_show_means_and_intervals_over_frames(tmp_path):
    result = make_result()
    entry = result["metrics"]["psnr"]
    theirs = result["baselines"]["copy_last_frame"]
    named = {"mine": result["metrics"], "theirs": theirs, "no frames": {"psnr": {"mean": 1}}, "nothing": {}}
    drawing = figures.curves(named, ["psnr"])
    (axes,) = drawing.chart.axes
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["mine", "theirs"]
    assert axes.lines[0].get_xydata().tolist() == [[i + 1, value] for i, value in enumerate(entry["per_frame"])]
    band = axes.collections[0].get_paths()[0].vertices
    for frame, (low, high) in enumerate(entry["per_frame_ci95"], start=1):
        heights = band[band[:, 0] == frame, 1]
        assert (heights.min(), heights.max()) == pytest.approx((low, high))
    drawing.save(tmp_path / "c.png")
    assert Image.open(tmp_path / "c.png").format == "PNG" and list(tmp_path.iterdir()) == [tmp_path / "c.png"]
    (axes,) = figures.curves({os.fsdecode(b"caf\xe9 $\\x$"): {"psnr": entry}}, ["psnr"]).chart.axes
    assert "\\udce9" in axes.get_legend().get_texts()[0].get_text()
    with pytest.raises(ValueError, match="curves of fvd: expected values per frame, found none"):
        figures.curves({"mine": result["metrics"]}, ["fvd"])
    both = figures.curves(named, ["psnr", "fvd", "ssim"]).chart.axes
    assert [axes.get_ylabel() for axes in both] == ["PSNR, dB ↑", "SSIM ↑"]


def test_inverse_curves_leave_out_frames_without_error():
    entry = {"per_frame": [0.0, 2.0, 4.0], "per_frame_ci95": [[0, 0], [1, 3], [-1, 9]]}
    (axes,) = figures.curves({"mine": {"crps": entry}}, ["crps"], inverse=True).chart.axes
    assert np.array_equal(axes.lines[0].get_ydata(), [np.nan, 0.5, 0.25], equal_nan=True)
    assert axes.get_ylabel() == "1 / CRPS ↑"


def test_ablation_shows_the_best_of_each_number_of_samples():
    entry = make_result()["metrics"]["psnr"]
    means, frames = figures.ablation({"mine": entry}, "psnr").chart.axes
    expected = [[1, entry["best_of"]["1"]["mean"]], [2, entry["best_of"]["2"]["mean"]], [4, entry["mean"]]]
    assert means.lines[0].get_xydata().tolist() == expected
    assert expected[0][1] < expected[1][1] < expected[2][1]
    assert frames.lines[1].get_ydata().tolist() == entry["best_of"]["2"]["per_frame"]
    assert [text.get_text() for text in frames.get_legend().get_texts()] == ["mine, 1", "mine, 2", "mine, 4"]


def test_quality_over_cost_joins_the_points_of_a_label():
    lines = {"lpips": {"steps": [(4.0, 0.1), (1.0, 0.3)], "one": [(2.0, 0.2)]}, "fvd": {"steps": [(1, 60)], "one": []}}
    lpips, fvd = figures.tradeoff(lines, "seconds").chart.axes
    assert lpips.lines[0].get_xydata().tolist() == [[1, 0.3], [4, 0.1]] and lpips.get_xscale() == "log"
    assert [text.get_text() for text in lpips.get_legend().get_texts()] == ["steps", "one"]
    assert len(fvd.lines) == 1 and fvd.get_xlabel() == "seconds" and fvd.get_ylabel() == "FVD ↓"
    with pytest.raises(ValueError, match="expected points with costs above 0, found 0"):
        figures.tradeoff({"fvd": {"free": [(0, 1)]}}, "seconds")


def test_maps_of_crps_are_darker_where_they_are_larger_on_one_scale():
    values = np.zeros((16, 16))
    values[:, 8:] = 5
    named = {"mine": torch.from_numpy(values), "theirs": torch.from_numpy(2 * values)}
    figure = figures.crps_maps(named, "clip 3").chart
    *panels, bar = figure.axes
    assert [axes.get_title() for axes in panels] == ["mine", "theirs"] and bar.get_ylabel() == "CRPS, of 255"
    assert figure.get_suptitle() == "clip 3"
    for axes, factor in zip(panels, (1, 2)):
        (shown,) = axes.images
        assert np.array_equal(shown.get_array(), factor * values)
        assert shown.get_clim() == (0, 10)  # of all panels
    light, dark, darkest = (sum(shown.cmap(shown.norm(value))[:3]) for value in (0, 5, 10))
    assert darkest < dark < light
    with pytest.raises(ValueError, match="map of CRPS, wrong: expected"):
        figures.crps_maps({"fine": values, "wrong": values[0]})


def test_maps_of_several_results_are_drawn_on_one_scale(tmp_path, caplog):
    paths = []
    for place, title in enumerate(("mean over 12 clips", "mean over 12 clips", "clip 3, predicted frame 2")):
        paths.append(write(tmp_path, f"{place}.json", make_result(f"model {place}", 0.05 + place / 100, place)))
        (tmp_path / str(place)).mkdir()
        maps = {"model": torch.full((16, 16), 1.0 + place), "copy_last_frame": torch.full((16, 16), 9.0)}
        save_file(maps, tmp_path / str(place) / "crps_maps.safetensors", metadata={"title": title})
    paths.append(write(tmp_path, "3.json", make_result("without maps")))
    files = compare(*paths, output=tmp_path / "out")["files"]
    assert Image.open(files["crps_maps"]).size[0] > 900  # three panels
    assert f"{paths[2]}: its map of CRPS is left out" in caplog.text
    (tmp_path / "0" / "crps_maps.safetensors").write_bytes(b"torn")
    with pytest.raises(OSError, match=r"crps_maps\.safetensors: cannot be read"):
        compare(*paths, output=tmp_path / "out")
