"""Make the W&B workspace of a project's runs, and a report that compares them, or bring both up to date.

``wandb_dashboard.py --project P [--entity E] [RUN_DIR ...]``; with run folders, only the panels that show what those
have logged. ``--dry-run`` prints what would be made and needs no network. ``--lineage RUN_DIR`` adds what offline runs
could not tell W&B, after ``wandb sync``: which artifacts they used.
"""

import argparse
import importlib.util
import logging

from latentcast.cli import Findings, UserError, run_tool, user_path

logger = logging.getLogger("latentcast")


def make_parser():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("run_dirs", nargs="*", metavar="RUN_DIR", type=user_path, help="show what these have logged")
    parser.add_argument("--project", required=True, help="of W&B, as wandb.project")
    parser.add_argument("--entity", help="user or team (default: the account's own)")
    parser.add_argument(
        "--lineage", metavar="RUN_DIR", type=user_path, action="append", default=[], help="add its lineage.json"
    )
    parser.add_argument("--dry-run", action="store_true", help="print it as JSON; nothing is sent")
    return parser


def main(args):
    from latentcast.training import dashboard, lineage
    from latentcast.training.trackers import logged_in, not_installed

    for package in ("wandb", "wandb_workspaces"):
        if importlib.util.find_spec(package) is None:
            raise UserError(not_installed(package))
    keys = logged_keys(args.run_dirs) if args.run_dirs else None
    edges = {folder: lineage.read_edges(folder) for folder in args.lineage}
    for folder, found in edges.items():
        if not found:
            raise UserError(f"--lineage {folder}: no {lineage.FILE} here; runs that log to W&B write it")
    figures = {
        "project": args.project,
        "entity": args.entity,
        "sections": dashboard.sections(keys),
        "report": {"title": dashboard.TITLE, "blocks": dashboard.blocks(keys)},
    }
    if not (args.dry_run or logged_in()):
        raise UserError("nobody is logged in at W&B; run wandb login first, or print what would be made: --dry-run")
    entity = args.entity or ("" if args.dry_run else default_entity())
    workspace = dashboard.workspace(entity, args.project, figures["sections"])
    report = dashboard.report(entity, args.project, figures["report"]["blocks"])
    if args.dry_run:
        made = {"workspace": workspace, "report": report}
        figures["specs"] = {name: dashboard.spec(what) for name, what in made.items()}
        figures["lineage"] = [edge for found in edges.values() for edge in found if not edge["declared"]]
        return figures
    figures |= {"entity": entity, **save(workspace, report), "lineage": 0}
    failed = []
    for folder, found in edges.items():
        n, missing = declare(found, entity)
        lineage.write_edges(folder, found)
        figures["lineage"] += n
        failed += missing
    for reason in failed:
        logger.warning("%s", reason)
    if failed:
        raise Findings(f"--lineage: {len(failed)} edges are missing (after wandb sync, try again)", figures)
    return figures


def logged_keys(folders):
    """The metrics that trainings in these run folders have logged."""
    from latentcast.training.metrics_file import read_metrics

    paths = [path for folder in folders for path in sorted((folder / "metrics").glob("*.csv"))]
    if not paths:
        raise UserError(f"{folders[0]}: no metrics/*.csv here; expected the folder of a run")
    return {name for path in paths for _, name, _ in read_metrics(path)}


# What follows needs a server, and is no longer than it must be.


def default_entity():
    import wandb

    return wandb.Api().default_entity


def save(workspace, report):
    """Save both in the place of those that an earlier call saved -> their addresses."""
    import wandb
    import wandb_workspaces.workspaces as ws

    api, place = wandb.Api(), f"{workspace.entity}/{workspace.project}"
    if workspace.project not in [project.name for project in api.projects(workspace.entity)]:
        raise UserError(f"{place}: W&B has no such project; log a run to it, or sync one, first")
    earlier = [found for found in api.reports(place) if found.display_name == report.title]
    if earlier:
        report.id = earlier[0].id
    report.save()
    try:
        view = workspace._internal_name.removeprefix("nw-").removesuffix("-v")
        workspace._internal_id = ws.Workspace.from_url(f"https://wandb.ai/{place}?nw={view}")._internal_id
    except ValueError:  # there is none yet
        pass
    workspace.save()
    return {"workspace_url": workspace.url, "report_url": report.url}


def declare(edges, entity):
    import wandb

    from latentcast.training.lineage import declare

    return declare(wandb.Api(), edges, entity)


if __name__ == "__main__":
    run_tool(main, make_parser())
