"""What the papers say of their systems against each other, beside what the league's runs say.

``league.yaml`` lists the claims. A run's other seeds are runs of their own, and a claim names them side by side.
"""

from dataclasses import dataclass, field

import yaml

from latentcast.evaluation.comparison import paired
from latentcast.evaluation.markdown import difference
from latentcast.figures.charts import HEADINGS

OPEN = "open: not all of its runs are finished"


@dataclass(frozen=True)
class Claim:
    """One paper's word that some runs are better than others, of the same seeds in the same order.

    Attributes:
        paper, says: whose, and what it says.
        better, than: names of runs, one a seed; none where no run here can tell, for the reason ``why``.
        metrics: by which it says so. no_worse: it says that they are as good, no more.
    """

    paper: str
    says: str
    better: list = field(default_factory=list)
    than: list = field(default_factory=list)
    metrics: list = field(default_factory=list)
    no_worse: bool = False
    why: str = ""

    def verdict(self, results):
        """-> (the verdict, differences as text); ``results``: name -> result of the runs that are finished.

        A metric tells by the 95 % interval of its paired differences, FVD, which has none, by its sign."""
        if self.why:
            return f"not decidable here: {self.why}", ""
        if not all(name in results for name in (*self.better, *self.than)):
            return OPEN, ""
        signs, texts = [], []
        for one, other in zip(self.better, self.than):
            found = [_difference(metric, results[other], results[one]) for metric in self.metrics]
            signs += [sign for sign, _ in found]
            texts.append("; ".join(text for _, text in found))
        if all(sign >= (0 if self.no_worse else 1) for sign in signs):
            told = "**confirmed**"
        elif all(sign < 0 for sign in signs):
            told = "**the opposite**"
        else:
            told = "**not confirmed**"
        seeds = f"{len(self.better)} seed{'s' * (len(self.better) > 1)}"
        return f"{told} ({seeds})", " / ".join(texts)


def _difference(metric, before, after):
    """-> (1 where ``after`` is better, -1 where it is worse, 0 where nobody can tell, the difference as text)."""
    name, _, arrow = HEADINGS[metric].rpartition(" ")
    name = name.partition(",")[0]
    if metric == "fvd":
        low = high = after["metrics"][metric]["mean"] - before["metrics"][metric]["mean"]
        text = f"{name} {low:+.3g}"
    else:
        found = paired(before, after)[metric]
        low, high = found["ci95"]
        text = f"{name} {difference(found)}"
    sign = (low > 0) - (high < 0)
    return (sign if arrow == "↑" else -sign), text


def read_claims(path, runs):
    """The claims of a YAML like league.yaml, in order.

    Raises:
        SystemExit: it names no such run, or other numbers of seeds on its two sides.
    """
    claims = [Claim(**claim) for claim in yaml.safe_load(path.read_text()).get("claims", ())]
    tables = {run.name: run.table for run in runs}
    for claim in claims:
        for name in (*claim.better, *claim.than):
            if name not in tables:
                raise SystemExit(f"{path}: claims: {claim.says}: expected names of runs, found {name}")
        if len(claim.better) != len(claim.than) or len({tables[name] for name in (*claim.better, *claim.than)}) > 1:
            raise SystemExit(f"{path}: claims: {claim.says}: expected as many runs on both sides, of one table")
    return claims


def section(claims, results):
    """Lines of Markdown: a row a claim; ``results``: name -> result of the runs that are finished."""
    rows = [[claim.paper, claim.says, *claim.verdict(results)] for claim in claims]
    heads = ["paper", "says", "here", "differences over the same clips, 95 %"]
    return [
        "## What the papers say, and what we say",
        "",
        "Confirmed: better by each of the metrics named, and by more than its interval (FVD, which has none: better). "
        "No worse: worse by none. The opposite: worse by each. At this size, and for this time of training.",
        "",
        *("| " + " | ".join(row) + " |" for row in (heads, ["---"] * len(heads), *rows)),
        "",
    ]
