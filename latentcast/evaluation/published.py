"""Published figures, in the units of latentcast.metrics, and those that belong beside a result."""

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field

from latentcast.schemas import Count, Number, Schema, Text, check, one_line, short
from latentcast.sizes import Size
from latentcast.yaml_text import read_yaml

from .protocol import METRICS
from .results import UNWRITTEN, measured

PUBLISHED = Path(__file__).with_name("published.yaml")


class Stated(Schema, extra="forbid"):
    """What a table or row says of its protocol; null: not stated."""

    n_context: Count | None = None
    n_predicted: Count | None = None
    fps_multiplier: Count | None = None
    n_samples: Count | None = None
    frame_size: Size | None = None
    data_protocol: Text | None = None


STATED = tuple(Stated.model_fields)


class Table(Schema, extra="forbid"):
    """A table of published figures."""

    paper: Text
    place: Text
    data: Text
    preset: Text | None
    selection: Literal["best", "mean"] | None  # of the samples of a clip
    protocol: Stated
    note: Text | None = None
    units: Annotated[dict[Literal[METRICS], Text], Field(min_length=1)]
    rows: list[dict[Text, Any]]


class Published(Schema):
    """The file PUBLISHED; its head says what is what."""

    papers: dict[Text, Text]
    units: dict[Text, Number | None]
    tables: list[Table]


def read_published(path: str | Path) -> list[dict]:
    """The published figures -> list of rows, one a method and table.

    A row has ``method``, ``paper``, ``place`` (the table), ``data``, ``preset`` (a protocol's name or None),
    ``selection`` ("best": of each clip's best sample; "mean": of all, none is chosen; None: not stated, or no
    difference), ``note``, ``protocol`` (STATED -> value; None: not stated; left out: as in UNWRITTEN) and ``metrics``:
    name -> {"printed": str, "unit": str, "value": float in the units of latentcast.metrics, or None where the printed
    unit is not known, "spread": float or None}.

    Raises:
        ValueError: no such file, or something in it is not as its head says; names table and row.
    """
    content = check(path, Published, read_yaml(path))
    rows = []
    for table in content["tables"]:
        where = one_line(f"{path}: {table['paper']}, {table['place']}, {table['data']}", 400)
        unknown = [unit for unit in table["units"].values() if unit not in content["units"]]
        unknown += [table["paper"]] * (table["paper"] not in content["papers"])
        if unknown:
            raise ValueError(f"{where}: {unknown[0]!r} is not known")
        for row in table["rows"]:
            stated = {key: value for key, value in row.items() if key not in ("method", *table["units"])}
            printed = {metric: row[metric] for metric in table["units"] if metric in row}
            check(f"{where}: {one_line(row.get('method'))}", Stated, stated)
            if not printed or not isinstance(row.get("method"), str):
                raise ValueError(f"{where}: {short(row)}: expected a method and some of {', '.join(table['units'])}")
            figures = {
                metric: _figure(f"{where}: {one_line(row['method'])}: {metric}", text, table["units"][metric], content)
                for metric, text in printed.items()
            }
            protocol = {key: (UNWRITTEN | table["protocol"] | stated).get(key) for key in STATED}
            shared = {key: table.get(key) for key in ("paper", "place", "data", "preset", "selection", "note")}
            rows.append({"method": row["method"], **shared, "protocol": protocol, "metrics": figures})
    return rows


def published_beside(rows: list[dict], result: dict) -> list[dict]:
    """Rows of the result's data that share a metric with it, each with ``differs``: field -> (theirs, ours).

    Those with the fewest differences come first.
    """
    ours = UNWRITTEN | result["protocol"] | {"data_protocol": (result["data"]["protocol"] or {}).get("protocol")}
    beside, metrics = [], {*measured([result["metrics"], *result["baselines"].values()])}
    for row in rows:
        if row["data"] == result["data"]["name"] and row["metrics"].keys() & metrics:
            sides = {key: (row["protocol"][key], ours[key]) for key in STATED}
            beside.append(row | {"differs": {key: pair for key, pair in sides.items() if pair[0] != pair[1]}})
    return sorted(beside, key=lambda row: len(row["differs"]))


def _figure(where, printed, unit, content):
    """A printed figure, "258.89 +- 2.85" say, with what it is in our units."""
    try:
        value, spread = (*(float(part) for part in printed.split("+-")), None)[:2]
    except (ValueError, AttributeError):
        raise ValueError(f"{where}: expected a figure as printed, in quotes, found {printed!r}") from None
    scale = content["units"][unit]
    value, spread = (None if None in (scale, number) else number * scale for number in (value, spread))
    return {"printed": printed, "unit": unit, "value": value, "spread": spread}
