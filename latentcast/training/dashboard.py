"""What W&B shows of latentcast's runs: a workspace of panels in sections, and a report that compares runs.

Panels are plain data, so that they can be printed and checked without W&B; ``workspace`` and ``report`` make of them
what ``wandb-workspaces`` sends to a server. The keys are those that ``trackers.py`` writes."""

import math
import re

from latentcast.command import named

from .trackers import MEDIA

NAME, VIEW = "latentcast", "nw-latentcast-v"  # of the workspace; W&B's own name of it, by which it is found again
TITLE = "latentcast: comparison of runs"
TIME = "Relative Time (Process)"  # W&B's name of the axis of what it measures by the clock


def line(title, *metrics, **options):
    return {"type": "line", "title": title, "metrics": list(metrics), **options}


def lines(title, regex, **options):
    """All metrics that a regular expression finds: those that a run numbers, or of any protocol."""
    return {"type": "line", "title": title, "regex": regex, **options}


def media(title, key):
    return {"type": "media", "title": title, "metrics": [f"{MEDIA}/{key}"]}


def bars(title, metric, summary):
    return {"type": "bar", "title": title, "metrics": [metric], "summary": summary}


def tested(title, metric):
    return lines(f"{title}, evaluations", rf"^evaluation/[^/]+/{metric}$")


SECTIONS = {  # in the order in which they are shown
    "overview": [
        line("loss", "train/loss", "val/loss"),
        line("learning rate", "train/lr"),
        line("gradient norm", "train/grad_norm", log_y=True),
        {"type": "runs", "title": "settings that differ"},
    ],
    "quality": [
        line("PSNR (dB)", "val/psnr"),
        line("SSIM", "val/ssim"),
        line("LPIPS", "val/lpips"),
        line("bits a code", "train/bits_per_code", "val/bits_per_code"),
        line("mean squared error", "train/mse", "val/mse", log_y=True),
        line("how much samples differ: standard deviation", "preview/sample_std"),
        line("how much samples differ: LPIPS", "preview/ilpips"),
        tested("PSNR (dB)", "psnr"),
        tested("SSIM", "ssim"),
        tested("LPIPS", "lpips"),
        tested("CRPS", "crps"),
        tested("FVD", "fvd"),
    ],
    "codebooks": [
        lines("usage", r"^(train|val)/usage_\d+$"),
        lines("perplexity", r"^(train|val)/perplexity_\d+$"),
        lines("dead fraction", r"^(train|val)/dead_fraction_\d+$"),
        lines("bits a code, by codebook", r"^(train|val)/bits_per_code_\d+$"),
    ],
    "latents": [
        line("KL divergence (nats)", "train/kl", "val/kl", log_y=True),
        lines("KL divergence, by group", r"^(train|val)/kl_group_\d+$", log_y=True),
        lines("active units, by group", r"^(train|val)/active_units_group_\d+$"),
    ],
    "samples": [
        media("reconstructions", "reconstructions"),
        media("futures", "futures_video"),
        media("futures, frame by frame", "futures"),
        media("clips at random, evaluation", "random_video"),
        media("best clips, evaluation", "best_video"),
        media("worst clips, evaluation", "worst_video"),
    ],
    "throughput": [
        line("clips a second", "throughput/clips_per_s"),
        line("frames a second", "throughput/frames_per_s"),
        line("codes a second", "throughput/codes_per_s"),
        line("share of time that waits for data", "throughput/data_wait"),
    ],
    "system": [  # what W&B measures itself, by its names
        lines("GPU (%)", r"^system/gpu\.\d+\.gpu$", x=TIME),
        lines("GPU memory (%)", r"^system/gpu\.\d+\.memoryAllocated$", x=TIME),
        line("CPU (%)", "system/cpu", x=TIME),
        line("memory of the process (MB)", "system/proc.memory.rssMB", x=TIME),
    ],
}
REPORT = {  # heading -> (types of the runs, panels)
    "Stage one: tokenizers": (
        ["tokenizer"],
        [
            bars("PSNR (dB), best", "val/psnr", "max"),
            bars("SSIM, best", "val/ssim", "max"),
            bars("loss, lowest", "val/loss", "min"),
            line("loss", "val/loss"),
            lines("usage", r"^val/usage_\d+$"),
            media("reconstructions", "reconstructions"),
        ],
    ),
    "Stage two: priors": (
        ["prior", "joint"],
        [
            bars("loss, lowest", "val/loss", "min"),
            line("loss", "val/loss"),
            line("how much samples differ: standard deviation", "preview/sample_std"),
            line("clips a second", "throughput/clips_per_s"),
            media("futures", "futures_video"),
        ],
    ),
    "Evaluations": (
        ["evaluation"],
        [
            *(tested(title, metric) for title, metric in (("PSNR (dB)", "psnr"), ("SSIM", "ssim"), ("LPIPS", "lpips"))),
            *(tested(title, metric) for title, metric in (("CRPS", "crps"), ("FVD", "fvd"))),
            media("clips at random", "random_video"),
        ],
    ),
}


def sections(keys=None):
    """The workspace's sections, each with a name and its panels.

    Args:
        keys: of what some runs have logged: only the panels that show any of them; None: all. What W&B measures or
            makes itself, and what evaluations log, stays in either case.
    """
    chosen = [{"name": name, "panels": [p for p in panels if _shown(p, keys)]} for name, panels in SECTIONS.items()]
    return [section for section in chosen if section["panels"]]


def blocks(keys=None):
    """The report's parts, each with a heading, the types of its runs, and its panels."""
    return [
        {"heading": heading, "job_types": kinds, "panels": [p for p in panels if _shown(p, keys)]}
        for heading, (kinds, panels) in REPORT.items()
    ]


def _shown(panel, keys):
    if keys is None or panel["type"] in ("runs", "media"):
        return True
    regex = panel.get("regex") or "|".join(f"^{re.escape(metric)}$" for metric in panel["metrics"])
    return bool(re.match(r"\^(system|evaluation)/", regex)) or any(re.search(regex, key) for key in keys)


def workspace(entity, project, found):
    """The workspace that ``sections`` describe, for ``wandb_workspaces``."""
    import wandb_workspaces.workspaces as ws

    made = ws.Workspace(
        entity=entity,
        project=project,
        name=NAME,
        sections=[
            ws.Section(
                name=section["name"],
                panels=_panels(section["panels"]),
                is_open=True,
                layout_settings=ws.SectionLayoutSettings(columns=3, rows=math.ceil(len(section["panels"]) / 3)),
            )
            for section in found
        ],
        settings=ws.WorkspaceSettings(x_axis="step", group_by_prefix="first"),
        auto_generate_panels=False,
        runset_settings=ws.RunsetSettings(
            pinned_columns=["run:jobType", "summary:val/loss.min", "config:parameters.value"],
        ),
    )
    made._internal_name = VIEW
    return made


def report(entity, project, found):
    """The report that ``blocks`` describe."""
    import wandb_workspaces.reports.v2 as wr

    tool = named("wandb_dashboard")
    parts = [
        wr.P(text=f"Runs of one experiment are a group; a stage is a type of run. Made by {tool}."),
        wr.TableOfContents(),
    ]
    for block in found:
        kinds = ", ".join(f"'{kind}'" for kind in block["job_types"])
        runs = wr.Runset(entity, project, name=block["heading"], filters=f"Metric('JobType') in [{kinds}]")
        parts += [wr.H1(text=block["heading"]), wr.PanelGrid(runsets=[runs], panels=_panels(block["panels"]))]
    return wr.Report(project=project, entity=entity, title=TITLE, blocks=parts, width="fluid")


def spec(made):
    """What is sent of a workspace or report, as plain data."""
    return made._to_model().spec.model_dump(mode="json", by_alias=True, exclude_none=True)


def _panels(found):
    import wandb_workspaces.reports.v2 as wr

    made = []
    for place, panel in enumerate(found):
        common = {"title": panel["title"], "layout": wr.Layout(x=8 * (place % 3), y=6 * (place // 3), w=8, h=6)}
        if panel["type"] == "line":
            y = {"metric_regex": panel["regex"]} if "regex" in panel else {"y": panel["metrics"]}
            made.append(wr.LinePlot(x=panel.get("x", "step"), log_y=panel.get("log_y"), **y, **common))
        elif panel["type"] == "bar":
            made.append(wr.BarPlot(metrics=[wr.SummaryMetric(f"{panel['metrics'][0]}.{panel['summary']}")], **common))
        elif panel["type"] == "media":
            made.append(wr.MediaBrowser(media_keys=panel["metrics"], mode="gallery", gallery_axis="step", **common))
        else:
            made.append(wr.RunComparer(diff_only=True, layout=common["layout"]))
    return made
