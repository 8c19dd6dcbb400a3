"""The site of docs/: it builds with no warning, and has every public name; links work there and on GitHub."""

import os
import re
import subprocess
import sys

import pytest
from doc_blocks import FENCE, PAGES
from tiny_experiment import ROOT

import latentcast

pytest.importorskip("mkdocs", reason="the extra latentcast[docs] is not installed")


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The built site; a link to nowhere, a page in no menu or a docstring that cannot be read would end it."""
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--quiet", "--strict", "--site-dir", folder]
    environment = os.environ | {"NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=200, env=environment)
    assert done.returncode == 0, done.stderr
    return folder


def test_the_reference_has_every_public_name_and_says_something_of_it(site):
    pages = "".join(path.read_text(encoding="utf-8") for path in sorted((site / "api").glob("*.html")))
    for name in latentcast.__all__:
        path = f"{latentcast._EXPORTS.get(name, 'latentcast')}.{name}"
        assert len(re.findall(rf'<h2 id="{re.escape(path)}"', pages)) == 1, name
        assert f'#{path}"><code>{name}</code>' in pages, f"{name}: not in the list of all"
        begin = pages.index(f'<h2 id="{path}"')
        told = re.search(r'<div class="doc doc-contents[^"]*">(.*?)</div>', pages[begin:], re.DOTALL)[1]
        assert name == "__version__" or re.search(r"<p>\w", told), f"{name}: no docstring"


def test_pages_are_what_stands_in_the_repository(site):
    texts = {path.stem: re.sub(r"<[^>]+>", "", path.read_text(encoding="utf-8")) for path in site.glob("*.html")}
    assert "Video prediction in latent space, in two stages" in texts["index"]
    assert "Five commands" in texts["own_videos"] and "Five commands" not in texts["index"]
    assert "paired" in texts["evaluation"] and "What a change has to prove" in texts["contributing"]
    contributing = (site / "contributing.html").read_text(encoding="utf-8")
    assert len(re.findall(r"<ol>(?:(?!</ol>).)*my_prior\.py.*?</ol>", contributing, re.DOTALL)) == 1
    assert (site / "quickstart.gif").is_file() and 'src="quickstart.gif"' in (site / "index.html").read_text()


def test_no_page_loads_anything_from_elsewhere(site):
    for path in site.rglob("*.html"):
        loaded = re.findall(r'(?:src|<link[^>]+href)="((?:https?:)?//[^"]+)', path.read_text(encoding="utf-8"))
        assert not loaded, path.name


def anchors(text):
    """The anchors that GitHub makes of a file's headings."""
    headings = re.findall(r"^#+ (.+)$", FENCE.sub("", text), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", [*PAGES, "CHANGELOG.md", "SECURITY.md"])
def test_links_lead_somewhere_on_github(page):
    text = FENCE.sub("", (ROOT / page).read_text(encoding="utf-8"))
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        target, _, anchor = link.partition("#")
        path = (ROOT / page).parent / target if target else ROOT / page
        if not link.startswith("https://"):
            assert path.exists(), f"{page}: {link}"
            assert not anchor or anchor in anchors(path.read_text(encoding="utf-8")), f"{page}: {link}"


@pytest.mark.parametrize("page", [*PAGES, "SECURITY.md"])
def test_files_that_are_named_are_there(page):
    text = (ROOT / page).read_text(encoding="utf-8").replace("tools/TOOL.py", "")
    for name in re.findall(r"\b(?:tools|benchmarks|tests|docs)/\w[\w/]*\.(?:py|md|yaml)\b", text):
        assert (ROOT / name).is_file(), f"{page}: {name}"
