"""The report: one file, whole without a network, with what the run's folder holds and nothing made up."""

import base64
import html.parser
import re

import pytest
from tiny_experiment import TOOLS, Started, finished, run_tool

from latentcast.evaluation.markdown import cell
from latentcast.evaluation.results import read_result
from latentcast.files import write_json
from latentcast.reporting.folder import read_run
from latentcast.reporting.page import write_page

PROTOCOL = ("protocol=video_folder", "protocol.name=tiny", "protocol.n_predicted=3", "protocol.n_samples=2")
CURVES = "preview.figures=[reconstructions, futures, training_tokenizer, training_prior]"


class Page(html.parser.HTMLParser):
    """What a browser would fetch or show.

    Attributes:
        urls: of pictures and videos. text: all text of the body. tags: names of the elements.
    """

    def __init__(self, path):
        super().__init__()
        self.urls, self.text, self.tags = [], "", []
        self.feed(path.read_text())

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.urls += [value for name, value in attrs if name in ("src", "srcset", "poster", "data") or tag == "link"]

    def handle_data(self, data):
        self.text += data

    def files(self):
        """The embedded files' contents, by kind."""
        found = {}
        for url in self.urls:
            kind, _, content = url.partition(";base64,")
            found.setdefault(kind.removeprefix("data:"), []).append(base64.b64decode(content))
        return found


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A run of both stages, evaluated."""
    folder = tmp_path_factory.mktemp("report")
    for tool in ("train_tokenizer", "encode_dataset", "train_prior"):
        status, _, err = run_tool(tool, folder, "preview.every_n_steps=2", CURVES)
        assert status == 0, err
    status, _, err = run_tool("evaluate", folder, *PROTOCOL)
    assert status == 0, err
    return folder / "run"


def report(*arguments):
    """Run the tool -> (exit status, figures or None, stderr)."""
    return finished(Started(TOOLS / "report.py", *arguments, cwd=arguments[0].parent))


def test_report_shows_what_the_run_left_and_needs_nothing_else(folder):
    status, figures, err = report(folder)
    assert status == 0, err
    path = folder / "report.html"
    assert figures == {"report": str(path), "bytes": path.stat().st_size, "left_out": []}
    page = Page(path)
    assert not {"script", "link", "iframe", "object"} & {*page.tags}
    assert page.urls and all(url.startswith(("data:image/png;base64,", "data:video/mp4;base64,")) for url in page.urls)
    files, on_disk = page.files(), lambda name: (folder / name).read_bytes()
    for name in ("metrics/tokenizer_curves.png", "metrics/prior_curves.png", "metrics/tiny/worst.png"):
        assert on_disk(name) in files["image/png"]
    latest = sorted((folder / "previews/prior").glob("*.mp4"))[-1]
    assert {latest.read_bytes(), on_disk("metrics/tiny/best.mp4")} <= {*files["video/mp4"]}
    assert b"avc1" in latest.read_bytes()  # h264, which browsers play
    result = read_result(folder / "metrics/tiny.json")
    for entry in [result["metrics"]["psnr"], result["baselines"]["copy_last_frame"]["ssim"]]:
        assert cell(entry) in page.text
    for command in ("train_tokenizer.py", "train_prior.py", "evaluate.py"):
        assert re.search(rf"python tools/{command} \S*tiny.yaml", page.text), command
    assert "preview.every_n_steps=2" in page.text and "codebook_size: 16" in page.text
    assert page.text.count("4 steps") >= 2 and "VideoTransformer" in page.text


def test_a_run_knows_the_command_that_repeats_it(folder):
    first = (folder / "config_prior.yaml").read_text().partition("\n")[0]
    command = f"# python tools/train_prior.py {folder.parent / 'tiny.yaml'} preview.every_n_steps=2 '{CURVES}'"
    assert first == command
    stages = {stage.name: stage for stage in read_run(folder).stages}
    assert stages["prior"].command == first.removeprefix("# ")
    assert stages["prior"].steps == 4 and stages["tokenizer"].n_parameters > 1000
    last, best = stages["tokenizer"].figures["psnr"]
    assert best >= last > 0
    assert read_result(folder / "metrics/tiny.json")["command"].startswith("python tools/evaluate.py ")


def test_too_large_a_report_leaves_files_out_and_names_them(folder, tmp_path):
    whole = tmp_path / "whole.html"
    assert write_page([read_run(folder)], whole) == []
    sizes = sorted(map(len, [content for found in Page(whole).files().values() for content in found]))
    limit = 300_000 + sizes[0] + sizes[1]
    left_out = write_page([read_run(folder)], tmp_path / "part.html", limit)
    page = Page(tmp_path / "part.html")
    assert (tmp_path / "part.html").stat().st_size <= limit
    assert left_out and len(left_out) + len(page.urls) == len(sizes)
    assert all(name in page.text for name in left_out)
    status, _, err = report(folder, "--max-mb", "0")
    assert status == 1 and err.splitlines()[-1] == "error: --max-mb: expected 1 to 1000, found 0"


def test_runs_are_compared_where_they_compare(folder, tmp_path):
    result = read_result(folder / "metrics/tiny.json")
    better, other = tmp_path / "better", tmp_path / "other"
    for run in (better, other):
        (run / "metrics" / "tiny").mkdir(parents=True)
    gain = 1.5
    entry = result["metrics"]["psnr"]
    raised = entry | {"mean": entry["mean"] + gain, "per_clip": [value + gain for value in entry["per_clip"]]}
    write_json(better / "metrics/tiny.json", result | {"metrics": result["metrics"] | {"psnr": raised}})
    write_json(other / "metrics/tiny.json", result | {"protocol": result["protocol"] | {"n_predicted": 9}})
    write_page([read_run(run) for run in (folder, better, other)], tmp_path / "page.html")
    page = Page(tmp_path / "page.html")
    assert "+1.5 [1.5, 1.5]" in page.text
    assert "other does not compare with run: n_predicted 3 and 9" in page.text
    best = re.findall(r'<td class="best">([^<]*)</td>', (tmp_path / "page.html").read_text())
    assert len(best) == 1 and best[0].startswith(f"{raised['mean']:.4g}")
    with pytest.raises(ValueError, match="given twice"):
        write_page([read_run(folder), read_run(folder)], tmp_path / "twice.html")


def test_names_are_text_and_damage_is_named(folder, tmp_path, caplog):
    run = tmp_path / "<b>&run"
    (run / "metrics" / "tiny").mkdir(parents=True)
    (run / "metrics" / "tiny.json").write_text("{")
    (run / "config_prior.yaml").write_text("prior: {_target_: latentcast.<i>Prior}\nx: [1\n")
    (run / "config_tokenizer.yaml").write_text("tokenizer: {_target_: latentcast.<i>VQVAE}\n")
    (run / "samples").mkdir()
    (run / "samples" / "a<script>.mp4").write_bytes(b"video")
    write_page([read_run(run)], tmp_path / "page.html")
    page = Page(tmp_path / "page.html")
    assert not {"b", "i", "script"} & ({*page.tags} - {"b"}) and "<i>VQVAE" in page.text and "<b>&run" in page.text
    assert "tiny.json" in caplog.text and "config_prior.yaml: not valid YAML" in caplog.text


def test_the_best_of_a_figure_is_the_largest_or_the_smallest_as_it_is_in_summaries(tmp_path):
    (tmp_path / "metrics").mkdir()
    (tmp_path / "config_tokenizer.yaml").write_text("tokenizer: {_target_: latentcast.VQVAE}\n")
    rows = [(n, f"val/{name}", value) for name in ("usage_1", "lpips") for n, value in ((5, 0.2), (10, 0.5), (15, 0.4))]
    lines = ["step,metric,value", *(",".join(map(str, row)) for row in rows), "15,val/us"]  # cut short by a kill
    (tmp_path / "metrics/tokenizer.csv").write_text("\n".join(lines))
    (stage,) = read_run(tmp_path).stages
    assert stage.steps == 15 and stage.figures == {"usage_1": (0.4, 0.5), "lpips": (0.4, 0.2)}


def test_what_is_no_run_is_one_line(folder, tmp_path):
    for path, message in (
        (tmp_path / "gone", "no such folder"),
        (tmp_path, "expected a run's folder"),
        (folder / "pipeline", "that is a pipeline: give the run's folder"),
    ):
        with pytest.raises((OSError, ValueError), match=message):
            read_run(path)
    status, _, err = report(folder, "--output", str(tmp_path / "no" / "page.html"))
    assert status == 1 and "no such folder" in err.splitlines()[-1]
