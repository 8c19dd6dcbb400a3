"""A hook of mkdocs (see mkdocs.yml): the site's pages that are not files of this folder.

README, CONTRIBUTING, CHANGELOG and SECURITY stand at the top of the repository; two sections of README are pages of
their own. The API reference follows from the public names of ``latentcast``.
"""

import os
import re
import shutil
import sys
import tempfile
from collections import defaultdict
from pathlib import Path

from mkdocs.plugins import event_priority
from mkdocs.structure.files import File
from pymdownx.slugs import slugify

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import latentcast  # noqa: E402

FILES = {
    "README.md": "index.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
    "SECURITY.md": "security.md",
}
SECTIONS = {"Your own videos": "own_videos.md", "Evaluation": "evaluation.md"}  # of README
LINK = re.compile(r"(?<=\]\()([^)#\s]+)(?=[)#])")

package = tempfile.TemporaryDirectory()


@event_priority(100)  # before mkdocstrings takes its own
def on_config(config):
    """Anchors as GitHub has them, and the package as a wheel has it for whoever reads it without importing it."""
    config.mdx_configs["toc"]["slugify"] = slugify(case="lower")
    home = Path(package.name) / "latentcast"
    shutil.copytree(ROOT / "latentcast", home, dirs_exist_ok=True)
    for room in sorted({module.split(".")[1] for module in latentcast._EXPORTS.values()}):
        if (ROOT / room).is_dir():  # mounted: see docs/architecture.md, Packaging
            shutil.copytree(ROOT / room, home / room, dirs_exist_ok=True)
            for folder in [home / room, *(path for path in (home / room).rglob("*") if path.is_dir())]:
                (folder / "__init__.py").touch()  # without one it would not be looked for inside a package
    config.plugins["mkdocstrings"].config.handlers["python"]["paths"] = [package.name]
    return config


def on_files(files, config):
    for name, content in {**texts(), **reference()}.items():
        files.append(File.generated(config, name, content=content))
    for path in ROOT.glob("examples/*.ipynb"):  # as they are
        files.append(File(f"examples/{path.name}", str(ROOT), config.site_dir, config.use_directory_urls))
    return files


def on_page_markdown(markdown, page, config, files):
    """Links between files of the repository as links between pages."""
    src = page.file.src_uri
    origins = {target: name for name, target in FILES.items()} | dict.fromkeys(SECTIONS.values(), "README.md")
    origin = Path(origins.get(src, f"docs/{src}"))

    def moved(link):
        target = os.path.normpath(origin.parent / link[0])
        if not (ROOT / target).exists():
            return link[0]
        return os.path.relpath(FILES.get(target, target.removeprefix("docs/")), Path(src).parent)

    return LINK.sub(moved, markdown)


def texts():
    """Page -> text, of files at the top of the repository and of README's sections."""
    found = {page: (ROOT / name).read_text(encoding="utf-8") for name, page in FILES.items()}
    start = found["index.md"]
    for heading, page in SECTIONS.items():
        before, title, rest = start.partition(f"\n## {heading}\n")
        section, rule, after = rest.partition("\n## ")
        if not title:
            raise ValueError(f"README.md: expected a section {heading!r}, which is a page of the site")
        found[page] = f"# {heading}\n{section}"
        start = f"{before}{title}\n[A page of its own]({page}).\n{rule}{after}"
    return found | {"index.md": start}


def reference():
    """Page -> text of the API reference: a page for each room, that is, folder of the package."""
    rooms = defaultdict(dict)
    for name in latentcast.__all__:
        module = latentcast._EXPORTS.get(name, "latentcast")
        room = module.split(".")[1] if module.count(".") > 1 else "latentcast"
        rooms[room][name] = f"{module}.{name}"
    index = "# Public names\n\nAll of `from latentcast import ...`; a name is imported when it is first used.\n"
    found = {}
    for room, names in rooms.items():
        links = ", ".join(f"[`{name}`]({room}.md#{path})" for name, path in names.items())
        index += f"\n- {'configs and models' if room == 'latentcast' else room}: {links}\n"
        title = "Configs and models" if room == "latentcast" else room.capitalize()
        found[f"api/{room}.md"] = f"# {title}\n\n" + "\n".join(f"::: {path}\n" for path in names.values())
    return found | {"api/index.md": index}
