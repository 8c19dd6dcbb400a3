"""Reading what trainings log to ``run_dir/metrics/STAGE.csv``, without the libraries that train."""

import csv


def read_metrics(path):
    """The rows of a metrics file -> list of (step, metric, value); a row cut short by a kill is left out."""
    rows = []
    with open(path, newline="") as file:
        for row in list(csv.reader(file))[1:]:
            try:
                step, name, value = row
                rows.append((int(step), name, float(value)))
            except ValueError:
                continue
    return rows
