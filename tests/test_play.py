"""tools/play.py: a prior that is played, through its server and in headless Chromium."""

import base64
import io
import json
import shutil
import time
import urllib.error
import urllib.request

import av
import numpy as np
import PIL.Image
import pytest
import torch
from tiny import SMALL_TRANSFORMER
from tiny_experiment import TOOLS, Started, free_port

from latentcast import PixelTokenizer, VideoPredictionPipeline, VideoTransformer
from latentcast.data.base import ShownClips
from latentcast.data.video.writer import to_uint8
from latentcast.zoo import export

play = pytest.importorskip("latentcast.play", exc_type=ImportError)

SIZE, N_CONTEXT, LENGTH = 8, 3, 7
STEER = {
    "action": {"shape": [], "dtype": "int64", "per": "frame", "n_values": 3},
    "state": {"shape": [2], "dtype": "float32", "per": "frame"},
}
PATIENCE = 60  # seconds, on a busy machine


def make_pipe(conditions=None):
    torch.manual_seed(0)
    spec = PixelTokenizer(1, SIZE, SIZE).latent_spec
    prior = VideoTransformer(spec, subscale=[4, 1, 1], conditions=conditions, **SMALL_TRANSFORMER)
    return VideoPredictionPipeline(prior, n_context=N_CONTEXT, fps=10)


def make_clips():
    frames = torch.randint(256, (2, LENGTH, 1, SIZE, SIZE), generator=torch.Generator().manual_seed(0)) / 127.5 - 1
    return ShownClips(frames, 10.0, ["one", "two"])


def told(action=0):
    return {"action": action, "state": [0.5, -1.0]}


def test_a_game_is_a_rollout():
    pipe, clips = make_pipe(STEER), make_clips()
    game = play.Game(pipe, clips, N_CONTEXT)
    assert torch.equal(game.reset(clip=1, seed=5), clips.frames[1, :N_CONTEXT])
    played = torch.stack([game.step(told(action)) for action in (1, 2, 0)])
    settings = {"generator": torch.Generator().manual_seed(5), "value_range": (-1, 1)}
    rollout = pipe.rollout(clips.frames[1:, :N_CONTEXT], **settings)
    same = torch.stack([rollout.step(told(action))[0, 0] for action in (1, 2, 0)])
    assert torch.equal(played, same)
    game.reset(clip=1, seed=5)
    assert not torch.equal(torch.stack([game.step(told(action)) for action in (2, 1, 1)]), played)


def test_a_prior_that_is_told_nothing_goes_on():
    game = play.Game(make_pipe(), make_clips(), N_CONTEXT)
    assert game.controls == []
    assert not torch.equal(game.step(None), game.step({}))


def test_what_does_not_fit_is_refused_and_the_game_goes_on():
    game = play.Game(make_pipe(STEER), make_clips(), N_CONTEXT)
    for values, message in ((told(7), "action: expected 0 to 2, found 7"), ({"action": 1}, "no state")):
        with pytest.raises(ValueError, match=message):
            game.step(values)
    with pytest.raises(ValueError, match="clip: expected 0 to 1, found 2"):
        game.reset(clip=2)
    game.step(told(1))


def test_a_page_knows_the_ranges_of_what_training_was_told():
    pipe = make_pipe(STEER)
    pipe.prior.conditioner.measure([{"action": torch.zeros(1, 50), "state": 3 + 2 * torch.randn(1, 50, 2)}])
    action, state = play.controls(pipe.prior)
    assert action == {"name": "action", "per": "frame", "shape": [], "n_values": 3, "names": None}
    assert 2 < state["mean"][0] < 4 and 3 < state["most"][0] - state["mean"][0] < 9


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """The tool at work, on a pipeline with example clips."""
    root = tmp_path_factory.mktemp("play")
    export(make_pipe(STEER), root / "tiny", make_clips().frames, {}, title="Tiny.", command="none", licence="MIT")
    port = free_port()
    process = Started(TOOLS / "play.py", "--pipeline", root / "tiny", "--port", port, "temperature=0.9", cwd=root)
    Started.running.remove(process)  # which each test's end would end
    process.address = f"http://127.0.0.1:{port}/"
    until = time.monotonic() + 2 * PATIENCE
    while f"ready at {process.address}" not in (said := process.read()[1]):
        assert process.poll() is None and time.monotonic() < until, said
        time.sleep(0.1)
    yield process
    if process.poll() is None:
        process.kill()


def ask(server, what, kind="application/json", **asked):
    """-> (status, content)"""
    body = json.dumps({"session": "test"} | asked).encode()
    request = urllib.request.Request(f"{server.address}api/{what}", body, {"content-type": kind})
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(request, timeout=PATIENCE) as answer:
            return answer.status, answer.read()
    except urllib.error.HTTPError as error:
        return error.code, error.read()


def picture(png):
    return np.asarray(PIL.Image.open(io.BytesIO(base64.b64decode(png))))


def test_server_plays_and_records(server, tmp_path):
    status, content = ask(server, "reset", clip=1, seed=2)
    given = [picture(png) for png in json.loads(content)["frames"]]
    assert status == 200 and np.array_equal(given, to_uint8(make_clips().frames[1, :N_CONTEXT], n_dims=4))
    first = [ask(server, "step", conditions=told(action))[1] for action in (1, 2)]
    assert ask(server, "reset", clip=1, seed=2)[0] == 200
    again = [ask(server, "step", conditions=told(action))[1] for action in (1, 2)]
    assert [json.loads(a)["frame"] for a in first] == [json.loads(a)["frame"] for a in again]
    status, film = ask(server, "record")
    with av.open(io.BytesIO(film)) as container:
        assert status == 200 and len(list(container.decode(video=0))) == N_CONTEXT + 2


def test_server_refuses_what_it_cannot_use(server):
    for status, message, asked in (
        (400, "conditions: action: expected 0 to 2, found 9", {"what": "step", "conditions": told(9)}),
        (400, "clip: expected 0 to 1, found 5", {"what": "reset", "clip": 5}),
        (400, "seed: expected a whole number", {"what": "reset", "seed": "x"}),
        (415, "expected application/json", {"what": "step", "kind": "text/plain"}),
        (413, "expected at most", {"what": "step", "conditions": "x" * 100_000}),
    ):
        found, content = ask(server, **asked)
        assert found == status and message in json.loads(content)["error"], content
    assert ask(server, "step", conditions=told())[0] == 200


@pytest.fixture
def browser():
    from chromium import open_chromium

    driver = open_chromium(PATIENCE)
    yield driver
    driver.quit()


@pytest.mark.skipif(not shutil.which("chromium"), reason="no chromium")
def test_page_is_played_by_keys(server, browser):
    from selenium.webdriver import ActionChains
    from selenium.webdriver.common.by import By
    from selenium.webdriver.common.keys import Keys
    from selenium.webdriver.support.ui import WebDriverWait

    browser.get(server.address)

    def until_said(text):
        WebDriverWait(browser, PATIENCE, 0.05).until(
            lambda _: browser.find_element(By.ID, "said").text.startswith(text)
        )

    def is_on(button):
        return "on" in button.get_attribute("class").split()

    given = f"given frame {N_CONTEXT} of {N_CONTEXT}"
    until_said(given)
    body = browser.find_element(By.TAG_NAME, "body")
    body.send_keys("n")
    until_said("frame 1")
    assert browser.find_element(By.ID, "screen").get_attribute("class") == "predicted"
    body.send_keys("p")
    until_said("frame 4 ")
    buttons = browser.find_elements(By.CSS_SELECTOR, "button.choice")
    assert [button.text for button in buttons] == ["0", "1 ↑", "2 ↓"]
    ActionChains(browser).key_down(Keys.ARROW_UP).perform()
    assert [is_on(button) for button in buttons] == [False, True, False]
    ActionChains(browser).key_up(Keys.ARROW_UP).perform()
    assert not any(is_on(button) for button in buttons)
    body.send_keys("r")
    until_said(given)
