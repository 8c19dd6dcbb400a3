"""tools/playground.py, clicked through in headless Chromium; what needs no browser without one."""

import importlib.util
import json
import os
import shutil
import signal
import socket
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import PIL.Image
import pytest
import torch
import torch.nn.functional as F
from diffusers import DDIMScheduler
from tiny import SMALL_SDE_DIFFUSION, SMALL_TRANSFORMER, small_recurrent_vae
from tiny_experiment import TOOLS, Started, free_port
from video_files import counter_frames, encode

import latentcast
from latentcast import PixelTokenizer, SDEDiffusion, VideoPredictionPipeline, VideoTransformer, probe, read_clip
from latentcast.data.video.folder import luma
from latentcast.data.video.reader import VideoError
from latentcast.figures.sheets import BORDER, LINE
from latentcast.zoo import export

pytest.importorskip("selenium")
from chromium import open_chromium
from selenium.common.exceptions import StaleElementReferenceException
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.support.ui import WebDriverWait

if importlib.util.find_spec("gradio") is None:  # imported late: it takes seconds, of every process that collects tests
    pytest.skip("no gradio", allow_module_level=True)

SIZE, SCALE, N_CONTEXT, LENGTH = 8, 16, 3, 7
PATIENCE = 60  # seconds, on a busy machine


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """A tiny pipeline with example clips, and files to upload."""
    root = tmp_path_factory.mktemp("playground")
    torch.manual_seed(0)
    prior = VideoTransformer(PixelTokenizer(1, SIZE, SIZE).latent_spec, subscale=[4, 1, 1], **SMALL_TRANSFORMER)
    clips = torch.randint(256, (3, LENGTH, 1, SIZE, SIZE)) / 127.5 - 1
    pipe = VideoPredictionPipeline(prior, n_context=N_CONTEXT, fps=10)
    export(pipe, root / "tiny", clips, {}, title="Tiny.", command="none", licence="MIT")
    encode(root / "walk.mp4", counter_frames(30), fps=20)
    (root / "notes.txt").write_text("no video\n" * 100)
    (root / "secret.txt").write_text("secret")
    return root


class Server:
    """The tool, serving ``root / "tiny"`` from the folder ``root``."""

    def __init__(self, root):
        self.port = free_port()
        self.address = f"http://127.0.0.1:{self.port}"
        arguments = ["--pipeline", root / "tiny", "--port", self.port, "--max-mb", 1]
        (root / "tmp").mkdir()
        self.files = root / "tmp"
        self.process = Started(TOOLS / "playground.py", *arguments, cwd=root, TMPDIR=self.files)
        Started.running.remove(self.process)  # which each test's end would end

    def wait(self):
        until = time.monotonic() + 2 * PATIENCE
        while f"ready at {self.address}" not in (said := self.process.read()[1]):
            assert self.process.poll() is None and time.monotonic() < until, said
            time.sleep(0.1)
        return self

    def get(self, path, data=None, **headers):
        """-> (status, headers, content)."""
        request = urllib.request.Request(self.address + path, data, headers)
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        try:
            with opener.open(request, timeout=PATIENCE) as answer:
                return answer.status, answer.headers, answer.read()
        except urllib.error.HTTPError as error:
            return error.code, error.headers, error.read()


class Browser:
    """Chromium, with one page."""

    def __init__(self, downloads):
        self.driver = open_chromium(PATIENCE)
        self.downloads = downloads
        allowed = {"behavior": "allow", "downloadPath": str(downloads)}
        self.driver.execute_cdp_cmd("Browser.setDownloadBehavior", allowed)

    def until(self, found, seconds=PATIENCE):
        ignored = (StaleElementReferenceException,)
        return WebDriverWait(self.driver, seconds, 0.1, ignored).until(lambda driver: found())

    def all(self, selector):
        return self.driver.find_elements(By.CSS_SELECTOR, selector)

    def text(self, selector):
        return " ".join(element.text for element in self.all(selector))

    def click(self, selector, index=0):
        self.until(lambda: len(self.all(selector)) > index)
        self.driver.execute_script("arguments[0].click()", self.all(selector)[index])

    def type(self, name, text):
        self.until(lambda: self.all(f"#{name} input, #{name} textarea"))
        self.all(f"#{name} input, #{name} textarea")[0].send_keys(Keys.CONTROL, "a", Keys.NULL, Keys.DELETE, text)

    def open(self, address):
        self.driver.get(address)
        self.until(lambda: "frames at" in self.text("#about"))

    def error(self):
        """The sentence that comes up, which is then put away."""
        text = self.until(lambda: self.text(".toast-body")).splitlines()[-1]
        for number in range(len(self.all(".toast-close"))):
            self.click(".toast-close", number)
        self.until(lambda: not self.all(".toast-body"))
        return text

    def predicted(self, server, words, path):
        """Wait for a prediction that is described by these words -> its video, fetched to ``path``."""
        self.until(lambda: words in self.text("#said") and self.all("#video video"))
        video = self.all("#video video")[0]
        self.until(lambda: video.get_property("readyState") >= 2)  # Chromium can play it
        path.write_bytes(server.get(video.get_attribute("src").removeprefix(server.address))[2])
        info = probe(path)
        assert video.get_property("duration") == pytest.approx(info.n_frames / info.fps, abs=0.1)
        assert video.get_property("videoWidth") == info.width
        return read_clip(path, range(info.n_frames)).float()


@pytest.fixture(scope="module")
def server(root):
    if not (shutil.which("chromium") and shutil.which("chromedriver")):
        pytest.skip("needs Chromium: apt-get install chromium chromium-driver")
    server = Server(root)
    yield server
    if server.process.poll() is None:
        server.process.kill()


@pytest.fixture(scope="module")
def browser(server, tmp_path_factory):  # they start beside each other
    browser = Browser(tmp_path_factory.mktemp("downloads"))
    try:
        server.wait()
        yield browser
    finally:
        browser.driver.quit()


def own_address():
    """An address of this machine beside the loopback's."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as trial:
        trial.connect(("192.0.2.1", 9))  # nothing is sent
        return trial.getsockname()[0]


def apart(one, other):
    """Mean absolute difference of pictures, grey levels."""
    return (one - other).abs().mean().item()


def test_an_example_its_futures_and_another_seed(browser, server, tmp_path):
    browser.open(server.address)
    assert "example 1" in browser.text("#about")
    browser.click("#examples button.thumbnail-item", 1)
    browser.until(lambda: "example 2" in browser.text("#about"))
    browser.type("num_samples", "2")
    browser.click("#predict")
    first = browser.predicted(server, "seed 0", tmp_path / "first.mp4")
    assert "example 2: 2 futures of 4 frames at 10 a second" in browser.text("#said")
    for kind in ("mp4", "gif", "png"):
        browser.click(f"#download-{kind}")
        file = browser.downloads / f"example-2-seed-0.{kind}"
        browser.until(file.exists)
        browser.until(lambda file=file: file.stat().st_size > 1000)
    assert len(first) == probe(browser.downloads / "example-2-seed-0.gif").n_frames == LENGTH
    with PIL.Image.open(browser.downloads / "example-2-seed-0.png") as sheet:
        assert sheet.size[0] > LENGTH * 8 * SIZE  # a column for each frame

    browser.click("#again")
    other = browser.predicted(server, "seed 1", tmp_path / "other.mp4")
    assert "example 2" in browser.text("#about") and "example 2" in browser.text("#said")
    third = first.shape[3] // 3
    assert apart(first[:N_CONTEXT], other[:N_CONTEXT]) < 3  # the clip is the same
    assert apart(first[..., :third], other[..., :third]) < 3  # and so is the truth
    assert apart(first[N_CONTEXT:, ..., third:], other[N_CONTEXT:, ..., third:]) > 20


def test_a_page_asks_nobody_else_and_fits_a_small_screen(browser, server):
    browser.driver.get_log("performance")
    browser.open(server.address)
    asked = [json.loads(entry["message"])["message"] for entry in browser.driver.get_log("performance")]
    urls = [event["params"]["request"]["url"] for event in asked if event["method"] == "Network.requestWillBeSent"]
    assert len(urls) > 5 and all(url.startswith((server.address, "data:", "blob:")) for url in urls)
    browser.driver.execute_cdp_cmd(
        "Emulation.setDeviceMetricsOverride", {"width": 400, "height": 900, "deviceScaleFactor": 1, "mobile": True}
    )
    try:
        browser.until(lambda: browser.driver.execute_script("return document.documentElement.scrollWidth") <= 400)
    finally:
        browser.driver.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})


def test_a_video_is_dropped_and_what_is_none_is_said(browser, server, root, tmp_path):
    browser.open(server.address)
    drop = "#upload input[type=file]"
    browser.all(drop)[0].send_keys(str(root / "notes.txt"))
    assert browser.error().startswith("notes.txt: not a readable video (Inval")  # data, or argument
    assert "example 1" in browser.text("#about")  # is still the clip
    browser.until(lambda: browser.all(drop))  # there is room for another
    browser.all(drop)[0].send_keys(str(root / "walk.mp4"))
    browser.until(lambda: "walk.mp4, 3 frames at 10 a second" in browser.text("#about"))
    browser.type("num_samples", "1")
    browser.type("n_frames", "5")
    browser.click("#predict")
    video = browser.predicted(server, "walk.mp4: 1 future of 5 frames", tmp_path / "walk.mp4")
    assert len(video) == N_CONTEXT + 5
    top, left = 2 * LINE + BORDER * SCALE, BORDER * SCALE
    truth = video[..., top : top + SIZE * SCALE, left : left + SIZE * SCALE].mean(1, keepdim=True)
    every_second = luma(read_clip(root / "walk.mp4", range(0, 16, 2), SIZE))  # the pipeline's rate is half the file's
    assert apart(F.avg_pool2d(truth, SCALE), every_second) < 5


def test_an_option_out_of_range_is_a_sentence(browser, server, tmp_path):
    browser.open(server.address)
    browser.click("#options button")
    browser.type("num_samples", "1")
    for name, wrong, right, sentence in [
        ("top_k", "0", "5", "top_k: expected an integer >= 1 or None, found 0"),
        ("temperature", "-1", "0.5", "temperature: expected a number >= 0, found -1"),
        ("n_frames", "10000", "2", "frames to predict: expected a whole number from 1 to 512, found 10000"),
        ("start", "5", "1", "example 1: 8 frames are needed, 7 are there"),
    ]:
        browser.type(name, wrong)
        browser.click("#predict")
        assert sentence in browser.error()
        browser.type(name, right)
    browser.click("#predict")
    assert len(browser.predicted(server, "1 future of 2 frames", tmp_path / "right.mp4")) == N_CONTEXT + 2


def test_stop_ends_a_long_prediction_and_the_next_one_runs(browser, server, tmp_path):
    browser.open(server.address)
    browser.type("n_frames", "200")
    browser.click("#predict")
    browser.until(lambda: "predicting" in browser.text("#video"))
    assert "steps" in browser.text("#video")
    browser.click("#stop")
    browser.until(lambda: "Stopped." in browser.text(".toast-body"))
    browser.type("n_frames", "2")
    browser.click("#predict")
    assert len(browser.predicted(server, "4 futures of 2 frames", tmp_path / "next.mp4")) == N_CONTEXT + 2


def test_nothing_else_is_served_and_little_is_taken(browser, server, root):
    """Files outside the cache, other pages' names for this machine, and large uploads are refused."""
    status, headers, page = server.get("/")
    assert status == 200 and b"gradio" in page
    assert "default-src 'self'" in headers["content-security-policy"]
    secret = root / "secret.txt"
    for path in (
        secret,
        "secret.txt",
        root / "tiny/model_index.json",
        "/etc/hostname",
        f"{server.files}/../secret.txt",
    ):
        status, _, content = server.get(f"/gradio_api/file={path}")
        assert status in (403, 404) and b"secret" not in content.replace(b"secret.txt", b""), path
    assert server.get("/", Host="evil.example")[0] == 400
    body = b'--x\r\nContent-Disposition: form-data; name="files"; filename="a.mp4"\r\n\r\n%s\r\n--x--\r\n'
    form = {"Content-Type": "multipart/form-data; boundary=x"}
    assert server.get("/gradio_api/upload", body % bytes(1000), **form)[0] == 200
    assert server.get("/gradio_api/upload", body % bytes(1_100_000), **form)[0] == 413
    with pytest.raises(OSError):  # on this machine's own address it does not listen
        socket.create_connection((own_address(), server.port), timeout=5).close()


def test_a_port_in_use_is_one_line(browser, server, root, command):
    status, _, err = command("playground", "--pipeline", root / "tiny", "--port", server.port)
    assert status == 1
    expected = f"error: --host 127.0.0.1 --port {server.port}: cannot be had (Address already in use); choose another"
    assert err.strip() == expected


def test_ctrl_c_ends_it_and_removes_its_files(browser, server):
    """Also while it predicts. The last of the tests that use the server."""
    browser.open(server.address)
    browser.type("n_frames", "200")
    browser.click("#predict")
    browser.until(lambda: "predicting" in browser.text("#video"))
    assert list(server.files.iterdir())
    os.kill(server.process.pid, signal.SIGINT)
    out, err = server.process.communicate(timeout=PATIENCE)
    assert server.process.returncode == 0, err
    figures = json.loads(out.splitlines()[-1])
    assert figures["address"].startswith(server.address) and figures["predictions"] >= 1
    assert not list(server.files.iterdir()) and "Traceback" not in err


def test_without_gradio_the_extra_is_named(root, command, monkeypatch):
    monkeypatch.delitem(sys.modules, "latentcast.playground", raising=False)
    monkeypatch.delattr(latentcast, "playground", raising=False)
    monkeypatch.setenv("GRADIO_TEMP_DIR", "")  # which the tool sets
    monkeypatch.setitem(sys.modules, "gradio", None)  # as where it is not installed
    status, _, err = command("playground", "--pipeline", root / "tiny", "--port", free_port())
    assert status == 1
    assert err.splitlines()[-1] == 'error: the playground needs gradio: pip install "latentcast[demo]"'


@pytest.fixture
def playground(tmp_path):
    """name -> a Playground on a tiny prior over pixels that may read 20 frames of a video."""
    from latentcast.playground import Playground

    tokenizer = PixelTokenizer(1, SIZE, SIZE, levels=None)
    priors = {
        "sde": lambda: SDEDiffusion(tokenizer.latent_spec, **SMALL_SDE_DIFFUSION),
        "svg": lambda: small_recurrent_vae(tokenizer.latent_spec, n_groups=0),
    }

    def make(name, **settings):
        pipe = VideoPredictionPipeline(priors[name](), tokenizer, n_context=N_CONTEXT, fps=10, **settings)
        return Playground(pipe, torch.rand(2, LENGTH, 1, SIZE, SIZE) * 2 - 1, tmp_path / "futures", 20)

    return make


def test_twice_the_frame_rate_and_each_step_is_told(playground):
    from latentcast.playground import Stopped

    served, told = playground("sde"), []
    options = {"n_steps": 2.0, "fps_multiplier": 2, "horizon": " ", "scheduler": "ddim"}
    served.pipe.set_progress_bar_config(disable=True)
    clip = served.examples[1]
    *files, words = served.predict(clip, 0, N_CONTEXT, 4, 1, 7, options, lambda *step: told.append(step))
    assert [Path(file).name for file in files] == [f"example-2-seed-7.{kind}" for kind in ("mp4", "gif", "png")]
    info = probe(files[0])
    assert info.fps == 20 and info.n_frames == 5 + 4 and "at 20 a second" in words
    assert told == [(done, 8) for done in range(1, 9)]
    earlier = [Path(file).read_bytes() for file in files]
    *files, _ = served.predict(clip, 0, N_CONTEXT, 4, 1, 7, options)
    assert [Path(file).read_bytes() for file in files] == earlier
    assert sorted(os.listdir(served.folder)) == sorted(Path(file).name for file in files)  # of the last one alone

    def stop(done, total):
        raise Stopped

    with pytest.raises(Stopped):
        served.predict(clip, 0, N_CONTEXT, 4, 1, 7, options, stop)
    with pytest.raises(ValueError, match=r"^horizon: expected a whole number of at least 1, found 0"):
        served.predict(clip, 0, N_CONTEXT, 4, 1, 7, options | {"horizon": "0"})
    with pytest.raises(ValueError, match="clip: expected an example or a video, found nothing"):
        served.predict(None, 0, N_CONTEXT, 4, 1, 7, options)
    with pytest.raises(ValueError, match=r"frames to predict: expected at most .* of 64 futures, found 512"):
        served.predict(clip, 0, N_CONTEXT, 512, 64, 7, options)


def test_what_cannot_be_chosen_is_not_offered(playground):
    options = playground("sde").options
    assert "scheduler" in options and "frame_times" not in options
    assert "scheduler" not in playground("sde", scheduler=DDIMScheduler()).options
    served = playground("svg")
    assert served.options.keys() == {"batch_statistics", "sample_batch", "z_groups"}
    *_, words = served.predict(served.examples[0], 0, N_CONTEXT, 4, 5, 0, {"z_groups": ""})
    assert "1 future of 4 frames" in words  # it draws nothing


@pytest.mark.parametrize("suffix, options", [(".mp4", {}), (".gif", {"codec": "gif", "pix_fmt": "rgb8"})])
def test_no_more_of_a_video_is_read_than_may_be(playground, tmp_path, suffix, options):
    """Of a file whose packets tell its frames the first ones alone count, of others all."""
    from latentcast.playground import Clip

    served = playground("sde")
    path = encode(tmp_path / f"long{suffix}", counter_frames(40), fps=10, **options)
    clip = Clip(path.name, path=path)
    if suffix == ".mp4":
        assert len(served.read(clip, 10, 5, 5)[1]) == 5
    with pytest.raises(VideoError, match=f"long{suffix}: expected at most 20 frames to be read, found 40"):
        served.read(clip, 20, 10, 10)


def test_a_name_is_text_in_the_page(playground, tmp_path):
    """Of a stranger's pipeline; what Markdown makes of it is cleaned in the browser."""
    import gradio as gr

    from latentcast.playground import build, serving

    title = "</script><script>evil()</script><img src=x onerror=evil()>"
    made = playground("svg")
    shown = [block for block in build(made, title).blocks.values() if isinstance(block, gr.Markdown)]
    assert any("evil" in block.value for block in shown) and all(block.sanitize_html for block in shown)
    clips = torch.zeros(1, LENGTH, 1, SIZE, SIZE)
    with serving(made.pipe, clips, title, tmp_path, "127.0.0.1", free_port(), 1, 20) as (address, _):
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        with opener.open(address, timeout=PATIENCE) as answer:
            html = answer.read().decode()
    assert "evil" in html and "<script>evil" not in html and "<img src=x" not in html
