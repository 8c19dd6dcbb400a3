"""What there is to choose from: the files under ``configs/``, by name, with what they say of themselves.

No YAML is read for it and nothing heavy imported, so that a shell that completes names need not wait.
"""

import importlib
from pathlib import Path

KINDS = {  # what a list calls them -> the folder under configs/, which is the key to choose one by
    "tokenizers": "tokenizer",
    "priors": "prior",
    "experiments": "experiment",
    "protocols": "protocol",
    "data": "data",
}


def config_root():
    """The folder ``configs/``, wherever latentcast is installed."""
    module = importlib.import_module("latentcast.configs")
    return Path(next(iter(module.__path__)))


def names_below(folder):
    """The configs in a folder and below it: "vqvae", "small/lvt"; sorted."""
    return sorted(path.relative_to(folder).with_suffix("").as_posix() for path in folder.rglob("*.yaml"))


def described(folder):
    """name -> the first sentence of its file, "" where it begins without a comment; of a folder of ``configs/``."""
    root = config_root() / folder
    return {name: _first_sentence(root / f"{name}.yaml") for name in names_below(root)}


def _first_sentence(path):
    comment = []
    with open(path, encoding="utf-8") as file:
        for line in file:
            if not line.startswith("#"):
                break
            comment.append(line.lstrip("#").strip())
    return " ".join(comment).partition(". ")[0].removesuffix(".")


# What a shell may complete, by argcomplete's protocol: a prefix -> word -> description.


def complete_experiment(prefix, **_):
    found = {name: text for name, text in described("experiment").items() if name.startswith(prefix)}
    if found:
        return found
    from argcomplete.completers import FilesCompleter

    return dict.fromkeys(FilesCompleter(("yaml", "yml"))(prefix), "")


def complete_data(prefix, **_):
    return described("data")


def complete_overrides(prefix, **_):
    """``group=NAME``; the groups alone until one is typed."""
    groups = {folder: kind for kind, folder in KINDS.items() if folder != "experiment"}
    group, chosen, _ = prefix.partition("=")
    if not chosen:
        return {f"{name}=": kind for name, kind in groups.items()}
    return {f"{group}={name}": text for name, text in described(group).items()} if group in groups else {}


def complete_words(prefix, **_):
    """Of a tool that takes both in one row."""
    return complete_overrides(prefix) | ({} if "=" in prefix else complete_experiment(prefix))
