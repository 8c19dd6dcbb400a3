"""What was made from what: tokenizer -> latents -> prior -> evaluation, as artifacts of Weights & Biases.

``run_dir/lineage.json`` has an edge for each artifact that a run used or made. Offline W&B takes what is made, but
refuses to note what is used; ``declare`` does that when the runs are on a server."""

import json
import re
from pathlib import Path
from typing import Literal

from latentcast.data.base import SPLITS
from latentcast.files import MANIFEST_MB, file_sha256, read_json, write_json
from latentcast.schemas import Schema, Text, read_checked
from latentcast.urls import Url

FILE = "lineage.json"


class Ran(Schema):
    """A run of W&B; ``entity`` is empty where nobody was logged in."""

    id: Text
    stage: Text
    entity: Text
    project: Text


class Artifact(Schema):
    """An artifact of W&B; ``digest`` is W&B's own, of what the files hold."""

    name: Text
    type: Text
    entity: Text
    project: Text
    digest: Text


class Edge(Schema):
    """``declared``: W&B knows of it."""

    run: Ran
    direction: Literal["uses", "makes"]
    artifact: Artifact
    declared: bool


class LineageFile(Schema):
    edges: list[Edge]


def read_edges(folder):
    """The edges in a folder's ``lineage.json`` as dicts; none where there is no such file."""
    path = Path(folder) / FILE
    return read_checked(path, LineageFile)["edges"] if path.is_file() else []


def write_edges(folder, edges):
    write_json(Path(folder) / FILE, {"edges": edges})


def link(run, folder, experiment, stage, direction, kind, paths):
    """Log that a run of W&B uses or makes an artifact, and add the edge to ``folder/lineage.json``.

    Args:
        run: of ``wandb.init``.
        folder: ``run_dir``. experiment: its name, which names what it makes. stage: of the run.
        direction: "uses" or "makes".
        kind: "tokenizer", "prior", "latents" (``paths``: the folder), or "evaluation" (its files).
    """
    name = f"{re.sub(r'[^a-zA-Z0-9_.-]', '-', experiment)[:100]}-{kind}"
    here = {"entity": run.entity or "", "project": run.project}
    artifact = build(name, kind, paths)
    made = next((edge["artifact"] for edge in _made_near(folder, paths[0]) if _digest(edge) == artifact.digest), None)
    if direction == "uses" and made is not None and made["name"] != name:
        artifact = build(made["name"], kind, paths)
    if direction == "makes":
        run.log_artifact(artifact)
    elif not run.offline:
        run.use_artifact(artifact)  # which is the version that was logged, where there is one with these files
    noted = {"name": artifact.name.partition(":")[0], "type": kind, **here, "digest": artifact.digest}
    edge = {
        "run": {"id": run.id, "stage": stage, **here},
        "direction": direction,
        "artifact": made if direction == "uses" and made is not None and run.offline else noted,
        "declared": direction == "makes" or not run.offline,
    }
    same = [edge["run"]["id"], direction, edge["artifact"]["name"], kind]
    kept = [e for e in read_edges(folder) if [e["run"]["id"], e["direction"], *_named(e)] != same]
    write_edges(folder, [*kept, edge])


def build(name, kind, paths):
    """A W&B artifact that is not logged yet: models and results as files, which stay where they are until they are
    uploaded; a latents cache as references to its files, each split's manifest, which has all checksums, by its own."""
    import wandb

    if isinstance(paths[0], Url):
        return _build_of_url(name, kind, paths[0])
    paths = [Path(path).resolve() for path in paths]
    if kind != "latents":
        artifact = wandb.Artifact(name, type=kind, metadata={"path": str(paths[0])})
        for path in paths:
            if not path.exists():
                raise FileNotFoundError(f"{path}: no such file or folder")
            found = sorted(path.rglob("*")) if path.is_dir() else [path]
            for file in found:
                if file.is_file() and not file.name.startswith("."):
                    inside = file.relative_to(path if path.is_dir() else path.parent)
                    artifact.add_file(str(file), name=str(inside), policy="immutable")
        return artifact
    (root,) = paths
    manifests = sorted(root.glob("*/manifest.json"))
    splits = {path.parent.name: _about(path) for path in manifests}
    artifact = wandb.Artifact(name, type=kind, metadata={"path": str(root), "splits": splits})
    for manifest in manifests:
        split = manifest.parent
        artifact.add_reference(manifest.as_uri(), name=f"{split.name}/{manifest.name}")
        for shard in sorted(split.glob("*.safetensors")):
            artifact.add_reference(shard.as_uri(), name=f"{split.name}/{shard.name}", checksum=False)
    return artifact


def _build_of_url(name, kind, root):
    """The same for a latents cache behind a URL: references to its splits, where W&B does not look, and a file whose
    checksums say when the cache is another one."""
    import wandb

    manifests = [path for split in SPLITS if (path := root / split / "manifest.json").is_file()]
    splits = {str(path).split("/")[-2]: _about(path) for path in manifests}
    artifact = wandb.Artifact(name, type=kind, metadata={"path": str(root), "splits": splits})
    for split in splits:
        artifact.add_reference(f"{root}/{split}", name=split, checksum=False)
    with artifact.new_file("splits.json") as file:
        json.dump(splits, file, indent=1)
    return artifact


def declare(api, edges, entity):
    """Tell W&B's server of edges whose runs are synced.

    Args:
        api: a ``wandb.Api``.
        edges: as ``read_edges`` gives them; those that are declared now are marked.
        entity: of runs that were made without an account.
    Returns:
        (number of edges that were declared, one line for each that could not be).
    """
    n_declared, failed = 0, []
    for edge in edges:
        if edge["declared"]:
            continue
        run, artifact = edge["run"], edge["artifact"]
        place = f"{run['entity'] or entity}/{run['project']}/{run['id']}"
        source = f"{artifact['entity'] or entity}/{artifact['project']}/{artifact['name']}"
        try:
            versions = api.artifacts(artifact["type"], source)
            version = next((v for v in versions if v.digest == artifact["digest"]), None)
            if version is None:
                failed.append(f"{place} uses {source}: no version of it has the digest {artifact['digest']}")
                continue
            api.run(place).use_artifact(version)
        except Exception as error:  # W&B's own kinds
            failed.append(f"{place} uses {source}: {one_line_of(error)}")
            continue
        edge["declared"] = True
        n_declared += 1
    return n_declared, failed


def one_line_of(error):
    return f"{type(error).__name__}: {' '.join(str(error).split())}"


def _made_near(folder, path):
    """Edges of what was made by the runs of this folder, and of those above a path: its run's."""
    above = [] if isinstance(path, Url) else list(Path(path).resolve().parents)[:3]
    folders = dict.fromkeys([Path(folder).resolve(), *above])
    return [edge for place in folders for edge in read_edges(place) if edge["direction"] == "makes"]


def _digest(edge):
    return edge["artifact"]["digest"]


def _named(edge):
    return edge["artifact"]["name"], edge["artifact"]["type"]


def _about(manifest):
    found = read_json(manifest, MANIFEST_MB)
    return {
        "sha256": file_sha256(manifest),
        "tokenizer": found.get("tokenizer"),
        "store": found.get("store"),
        "shards": len(found.get("shards", [])),
    }
