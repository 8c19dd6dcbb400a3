"""Reading what trainings log to ``run_dir/metrics/STAGE.csv``, without the libraries that train."""

import csv


def read_metrics(path):
    """The rows of a metrics file -> list of (step, metric, value); a row cut short by a kill is left out. Raises
    ValueError, one line, where it is no table."""
    rows = []
    with open(path, newline="", errors="replace") as file:
        try:
            lines = list(csv.reader(file))
        except csv.Error as error:
            raise ValueError(f"{path}: not a readable csv file ({error})") from None
    for row in lines[1:]:
        try:
            step, name, value = row
            rows.append((int(step), name, float(value)))
        except ValueError:
            continue
    return rows
