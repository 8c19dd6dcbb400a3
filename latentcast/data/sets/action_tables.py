"""Tables of actions that lie beside videos: csv, npy and parquet files, one row a frame."""

import contextlib
import csv
import functools
import importlib.util
import logging
import math
import re
import threading
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Shaped
from torch import Tensor

from latentcast.config import check_counts, one_line

from ...urls import Place
from ..video.reader import VideoAwayError, VideoError, is_away

logger = logging.getLogger("latentcast")

ROWS = ("after", "between", "before")
PLACE = re.compile(r"\{(\w*)\}")  # in the pattern of tables
SUFFIXES = (".csv", ".npy", ".parquet")
COLUMN = "action"  # of parquet files, unless other columns are asked for
MOST_ROWS = 10_000_000  # of a parquet file, in which zeros take no room: 92 hours at 30 frames a second
MOST_BYTES = 2**31  # that one is read in: lists of numbers take no more room than rows
LIMITING = threading.Lock()  # the limit is the process's
WHOLE = re.compile(r"[+-]?\d{1,18}")


def led_to(actions: Shaped[Tensor, "_ ..."], n_frames: int) -> Shaped[Tensor, "{n_frames} ..."]:
    """Actions, row t of which leads on from frame t -> (n_frames, ...), row t of which led to frame t, the first 0."""
    return torch.cat([actions.new_zeros(1, *actions.shape[1:]), actions])[:n_frames]


class ActionTables:
    """The tables of the videos below a folder, as the condition ``action``: what led to each frame, 0 at the first.

    Args:
        source: the folder.
        names: paths of the videos below it.
        pattern: path below ``source`` of the table of a video, in which ``{stem}`` is the video's name without suffix,
            ``{folder}`` its folder below ``source`` and ``{0}``, ``{1}``, ... the parts of its path:
            "{folder}/{stem}.csv", or "data/{1}/{stem}.parquet" for LeRobot's
            videos/chunk-000/CAMERA/episode_000000.mp4. See ``read_actions`` for the files.
        stride: every so manyth frame is kept. From 2 on an action has one dimension more, the first: the rows that led
            from one of these frames to the next.
        rows: "after": row t was done after frame t and leads to frame t + 1, the last row to none, as in LeRobot.
            "between": the same without that last row, as in Minari. "before": row t led to frame t, the first to none.
        columns: names of the columns to take, of csv and parquet files.
        dtype: "float32" or "int64"; None: int64 where all tables hold whole numbers from 0, written as such.
        values: how many whole numbers there are, from 0; None: up to the largest in all tables.
    Raises:
        ValueError: options that make no sense, or pyarrow is missing; one line.
    """

    def __init__(
        self,
        source: Place,
        names: Iterable[str],
        pattern: str,
        stride: int = 1,
        *,
        rows: str = ROWS[0],
        columns: Sequence[str] | None = None,
        dtype: str | None = None,
        values: int | None = None,
    ) -> None:
        self.source, self.names, self.pattern, self.stride = source, names, str(pattern), stride
        self.rows, self.columns = rows, [columns] if isinstance(columns, str) else columns
        self.dtype, self.values = dtype, values
        suffix = Path(self.pattern).suffix.lower()
        if suffix not in SUFFIXES:
            raise ValueError(f"--actions: expected the path of {', '.join(SUFFIXES)} files, found {one_line(pattern)}")
        for name in PLACE.findall(self.pattern):
            if name not in ("folder", "stem") and not name.isdigit():
                raise ValueError(f"--actions: expected {{folder}}, {{stem}}, {{0}}, {{1}}, ..., found {{{name}}}")
        if suffix == ".parquet" and importlib.util.find_spec("pyarrow") is None:
            extra = "pip install 'latentcast[parquet]'"
            raise ValueError(f"--actions: parquet needs pyarrow, which is not installed; {extra}")
        if rows not in ROWS:
            raise ValueError(f"action_rows: expected {', '.join(ROWS)}, found {rows!r}")
        if columns is not None:
            listed = isinstance(self.columns, list) and all(isinstance(name, str) for name in self.columns)
            if suffix == ".npy" or not listed or not self.columns:
                raise ValueError(f"action_columns: expected names, of csv or parquet files, found {one_line(columns)}")
        if dtype not in (None, "float32", "int64"):
            raise ValueError(f"action_dtype: expected float32, int64 or null, found {dtype!r}")
        if values is not None:
            check_counts(action_values=values)
            if dtype == "float32":
                raise ValueError(f"action_values: expected whole numbers beside it, found action_dtype={dtype}")

    @functools.cached_property
    def condition(self) -> dict:
        """What the condition ``action`` is (see VideoDataset). The first time all tables are read.

        Raises:
            ValueError: no table can be read, or not one that may hold the largest whole number."""
        row, dtype, largest, _ = self._found
        spec = {"shape": row if self.stride == 1 else [self.stride, *row], "dtype": dtype, "per": "frame"}
        return spec | ({"n_values": self.values or largest + 1} if dtype == "int64" else {})

    def read(self, name: str) -> "Table":
        """The table of a video -> Table; raises VideoError, one line that names the file."""
        path, actions = self._read(name)
        row, dtype, _, first = self._found
        if list(actions.shape[1:]) != row:
            raise VideoError(f"{path}: expected rows of shape {row} as in {first}, found {list(actions.shape[1:])}")
        if dtype == "int64":
            n_values = self.condition["n_values"]
            wrong = actions[(actions < 0) | (actions >= n_values) | (actions != actions.round())]
            if len(wrong):
                raise VideoError(f"{path}: expected whole numbers from 0 to {n_values - 1}, found {wrong[0]:g}")
        return Table(path, actions, self.rows, self.stride)

    def describe(self) -> dict:
        """JSON-able."""
        return {"tables": self.pattern, "rows": self.rows, "columns": self.columns}

    @functools.cached_property
    def _found(self):
        """(shape of a row, type, largest number, path of the first table), of all tables that can be read."""
        first, whole, largest, broken = None, True, 0, None
        for name in self.names:
            try:
                path, actions = self._read(name)
            except VideoError as error:
                broken = broken or error
                continue
            first = first or (list(actions.shape[1:]), path)
            whole = whole and actions.dtype == torch.int64 and int(actions.min()) >= 0
            largest = max(largest, int(actions.max()))
        if first is None:
            raise ValueError(str(broken))
        dtype = self.dtype or ("int64" if whole or self.values else "float32")
        if dtype == "int64" and self.values is None and broken:
            raise ValueError(f"{broken}; it may hold the largest action: mend it, or give action_values=NUMBER")
        logger.info("actions: %s, rows of shape %s", dtype, first[0])
        return first[0], dtype, largest, first[1]

    def _read(self, name):
        """-> (path of a video's table, its rows)"""
        path = Path(name)
        stem = path.name if (self.source / path).is_dir() else path.stem
        parts = {str(i): part for i, part in enumerate(path.parts)} | {"folder": str(path.parent), "stem": stem}
        try:
            table = self.source / PLACE.sub(lambda place: parts[place[1]], self.pattern)
        except KeyError as error:
            raise VideoError(f"{name}: expected a path with a part {error} for {self.pattern}, found none") from None
        return table, read_actions(table, self.columns)


@dataclass(frozen=True)
class Table:
    """The actions of one video; see ActionTables."""

    path: Path
    actions: torch.Tensor
    rows: str
    stride: int

    def along(self, pieces: Iterable[Tensor], conditions: dict[str, Tensor]) -> Iterator[Tensor]:
        """Pieces of all frames of the video -> those of every ``stride``-th frame; ``conditions`` has ``action`` when
        the last has passed. Raises VideoError for a table that is too short or too long."""
        n_frames = 0
        for piece in pieces:
            kept = piece[-n_frames % self.stride :: self.stride]
            n_frames += len(piece)
            if len(kept):
                yield kept
        n_rows = n_frames - (self.rows == "between")
        if len(self.actions) != n_rows:
            raise VideoError(
                f"{self.path}: expected {n_rows} rows for {n_frames} frames (action_rows={self.rows}), "
                f"found {len(self.actions)}"
            )
        led = led_to(self.actions[1:] if self.rows == "before" else self.actions, n_frames)
        if self.stride > 1:
            steps = (n_frames - 1) // self.stride
            led = led[1 : 1 + steps * self.stride].unflatten(0, (steps, self.stride))
            led = torch.cat([led.new_zeros(1, *led.shape[1:]), led])
        conditions["action"] = led


def read_actions(path: Place, columns: Sequence[str] | None = None) -> Shaped[Tensor, "T ..."]:
    """The rows of a table.

    Args:
        path: a csv file of numbers, with or without a row of names; a npy file, (T,) or (T, ...); a parquet file of
            numbers or lists of them.
        columns: names of the columns to take; None: all of a csv file, ``action`` of a parquet file.
    Returns:
        (T, *row): int64 where all are written as whole numbers, else float64. A row of one column is a number.
    Raises:
        VideoError: missing or damaged, a row or a column that is missing, something that is no number; one line.
    """
    try:
        table = {".csv": _csv, ".npy": _npy, ".parquet": _parquet}[path.suffix.lower()](path, columns)
    except FileNotFoundError:
        raise VideoError(f"{path}: no such file; expected a table of actions") from None
    except OSError as error:
        if isinstance(error, VideoError):
            raise
        kind = VideoAwayError if is_away(error) else VideoError
        raise kind(f"{path}: not a readable table ({' '.join(str(error.strerror or error).split())})") from None
    if table.dtype.kind not in "iufb" or table.ndim == 0:
        raise VideoError(f"{path}: expected rows of numbers, found {table.dtype} of shape {table.shape}")
    if len(table) == 0 or 0 in table.shape:
        raise VideoError(f"{path}: expected rows of numbers, found none")
    if not np.isfinite(table).all():
        row = int(np.argwhere(~np.isfinite(table))[0, 0])
        raise VideoError(f"{path}: row {row} (from 0): expected finite numbers, found {one_line(table[row].tolist())}")
    return torch.from_numpy(table.astype(np.float64 if table.dtype.kind == "f" else np.int64))


def _csv(path, columns):
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:
            rows = [[cell.strip() for cell in row] for row in csv.reader(file, skipinitialspace=True)]
    except (csv.Error, UnicodeDecodeError) as error:
        raise VideoError(f"{path}: not a readable csv file ({error})") from None
    while rows and not any(rows[-1]):
        rows.pop()
    names = rows[0] if rows and all(map(_is_name, rows[0])) else None
    places = _places(path, names, columns, len(rows[0]) if rows else 0)
    first = 1 if names is None else 2
    found, whole = [], True
    for number, row in enumerate(rows[first - 1 :], first):
        if len(row) != len(rows[0]):
            raise VideoError(
                f"{path}: row {number}: expected {len(rows[0])} numbers, found {len(row) if any(row) else 'none'}"
            )
        cells = [row[place] for place in places]
        numbers = [_number(cell) for cell in cells]
        if None in numbers:
            raise VideoError(f"{path}: row {number}: expected numbers, found {cells[numbers.index(None)]!r}")
        whole = whole and all(WHOLE.fullmatch(cell) for cell in cells)
        found.append(numbers)
    table = np.array(found, np.int64 if whole else np.float64).reshape(len(found), len(places))
    return table[:, 0] if len(places) == 1 else table


def _is_name(cell):
    try:
        float(cell)
    except ValueError:
        return cell != ""
    return False


def _number(cell):
    """The number that a cell holds, or None."""
    if WHOLE.fullmatch(cell):
        return int(cell)
    try:
        found = float(cell)
    except ValueError:
        return None
    return found if math.isfinite(found) else None


def _places(path, names, columns, n):
    if columns is None:
        return range(n)
    missing = [column for column in columns if column not in (names or ())]
    if missing:
        found = one_line(names) if names else "no row of names"
        raise VideoError(f"{path}: expected the columns {', '.join(columns)}, found {found}")
    return [names.index(column) for column in columns]


def _npy(path, columns):
    try:
        found = np.load(path, allow_pickle=False)
    except OSError:
        raise
    except Exception as error:  # whatever a damaged header leads to, out of memory for the shape that it states too
        raise VideoError(f"{path}: not a readable npy file of numbers ({' '.join(str(error).split())})") from None
    if not isinstance(found, np.ndarray):
        raise VideoError(f"{path}: expected a npy file of numbers, found a npz file")
    return found


def _parquet(path, columns):
    from pyarrow import parquet

    columns = [COLUMN] if columns is None else columns
    try:
        file = parquet.ParquetFile(path)
        known = file.schema_arrow.names
        missing = [column for column in columns if column not in known]
        if missing:
            raise VideoError(f"{path}: expected the columns {', '.join(columns)}, found {one_line(known)}")
        # Rows, and not the numbers in lists, which a page may state and the metadata not.
        if (n := file.metadata.num_rows) > MOST_ROWS:
            raise VideoError(f"{path}: expected a table of at most {MOST_ROWS} rows, found {n}")
        with _memory_limit(MOST_BYTES):
            table = file.read(columns=columns)
            found = [_column(path, column, table.column(column).to_pylist()) for column in columns]
    except OSError:
        raise
    except MemoryError:
        raise VideoError(f"{path}: expected a table that takes at most {MOST_BYTES >> 20} MB, found more") from None
    except Exception as error:  # Arrow's, and what bytes that are no text lead to
        raise VideoError(f"{path}: not a readable parquet file ({' '.join(str(error).split())})") from None
    if len(found) == 1:
        return found[0]
    return np.concatenate([column.reshape(len(column), -1) for column in found], 1)


@contextlib.contextmanager
def _memory_limit(n_bytes):
    """Raises MemoryError where the process would grow by more; on Linux: elsewhere there is no such limit."""
    try:
        status = Path("/proc/self/status").read_text()
    except OSError:
        yield
        return
    import resource

    with LIMITING:
        soft, hard = resource.getrlimit(resource.RLIMIT_DATA)
        most = int(re.search(r"VmData:\s*(\d+)", status)[1]) * 1024 + n_bytes
        others = [limit for limit in (soft, hard) if limit != resource.RLIM_INFINITY]
        resource.setrlimit(resource.RLIMIT_DATA, (min([most, *others]), hard))
        try:
            yield
        finally:
            resource.setrlimit(resource.RLIMIT_DATA, (soft, hard))


def _column(path, name, values):
    try:
        found = np.array(values)
    except ValueError:  # rows of different lengths
        found = np.array(None)
    if found.dtype.kind not in "iufb":
        raise VideoError(f"{path}: column {name}: expected numbers, as many in each row, found others")
    return found
