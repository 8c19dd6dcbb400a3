"""Set results of evaluations side by side: a table, paired differences from the first, plots.

Results under different protocols, data or detectors are refused, unless --force labels them. --published adds what the
papers published for the same data, and how their protocols differ.
"""

import argparse
import logging

from latentcast.cli import UserError, prepare_run_dir, run_tool, user_path

logger = logging.getLogger("latentcast")


def make_parser():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "results", nargs="+", type=user_path, metavar="A.json", help="metrics/PROTOCOL.json of each run"
    )
    parser.add_argument("--output", type=user_path, metavar="DIR", help="where comparison.md and the plots go")
    parser.add_argument("--published", action="store_true", help="set published figures of the same data beside")
    parser.add_argument("--force", action="store_true", help="set results side by side that do not compare")
    parser.add_argument(
        "--labels", nargs="+", help="names of the results (default: the models' names, or those of the runs)"
    )
    return parser


def main(args):
    from latentcast.evaluation import markdown
    from latentcast.evaluation.comparison import describe_differences, differences, paired
    from latentcast.evaluation.published import PUBLISHED, published_beside, read_published
    from latentcast.evaluation.results import read_result
    from latentcast.files import write_text

    results = name_results(args.results, [read_result(path) for path in args.results], args.labels)
    (first, reference), *others = results.items()
    unlike = {label: found for label, result in others if (found := differences(reference, result))}
    if unlike and not args.force:
        paths = dict(zip(results, args.results))
        lists = (f"{paths[label]}: {describe_differences(found)}" for label, found in unlike.items())
        raise UserError(
            f"{paths[first]} does not compare with {', with '.join(lists)} (its value first); "
            "--force sets them side by side all the same"
        )
    if args.output is not None:
        prepare_run_dir(args.output, "--output")
    pairs = {label: paired(reference, result) for label, result in others}
    tables = [markdown.table(results, unlike)]
    if any(pairs.values()):
        tables.append(markdown.difference_table(results, pairs))
    elif others:
        logger.warning("no differences: they share no metric that each of several videos has under the same settings")
    published = {}
    if args.published:
        rows = read_published(PUBLISHED)
        for name in dict.fromkeys(result["data"]["name"] for result in results.values()):
            same_data = {label: result for label, result in results.items() if result["data"]["name"] == name}
            published[name] = published_beside(rows, next(iter(same_data.values())))
            if published[name]:
                tables.append(markdown.published_table(same_data, published[name]))
            else:
                logger.warning("nothing published that shares a metric and the data set %s", name)
    text = "\n".join(tables)
    print(text)  # on stderr: see run_tool
    files = {}
    if args.output is not None:
        files["table"] = args.output / "comparison.md"
        write_text(files["table"], text)
        files |= draw(results, unlike, args.output) | draw_maps(dict(zip(results, args.results)), args.output)
    means = {
        label: {metric: {key: entry[key] for key in ("mean", "ci95")} for metric, entry in result["metrics"].items()}
        for label, result in results.items()
    }
    return {
        "results": means,
        "differences": pairs,
        "unlike": unlike,
        "published": published,
        "files": {name: str(path) for name, path in files.items()},
    }


def name_results(paths, results, labels):
    """label -> result; labels are the models' names, or where those are equal the names of their run folders."""
    if labels is not None and len(labels) != len(paths):
        raise UserError(f"--labels: expected one for each of {len(paths)} results, found {len(labels)}")
    if labels is None:
        labels = [result["model"]["name"] for result in results]
        labels = labels if len(set(labels)) == len(labels) else run_names(paths)
    taken = [*labels, *results[0]["baselines"]]
    for label in labels:
        if taken.count(label) > 1:
            raise UserError(f"{label!r} would name two columns; name the results by --labels")
    return dict(zip(labels, results))


def run_names(paths):
    """A name for each result out of its path: that of its run folder, and as many folders above as tell them apart."""
    from latentcast.files import telling_names

    parts = [path.resolve().with_suffix("").parts for path in paths]
    runs = [part[:-2] if part[-2] == "metrics" else part for part in parts]
    if len(set(runs)) < len(runs):  # several results of one run
        runs = parts
    return telling_names(runs) or [str(path) for path in paths]


def draw(results, unlike, folder):
    """Curves over frames and over numbers of samples -> name -> path."""
    from latentcast.evaluation.protocol import METRICS
    from latentcast.evaluation.report import write_curves

    marks = {label: f" (unlike {next(iter(results))})" for label in unlike}
    models = {label + marks.get(label, ""): result["metrics"] for label, result in results.items()}
    return write_curves(METRICS, models | next(iter(results.values()))["baselines"], models, folder)


def draw_maps(paths, folder):
    """CRPS of each pixel, of the results and of the first one's baselines, on one scale -> name -> path, if any."""
    from latentcast.evaluation.report import read_maps
    from latentcast.figures import crps_maps

    named, baselines, title = {}, {}, None
    for label, path in paths.items():
        maps, of = read_maps(path)
        if not maps:
            continue
        model = maps.pop("model")
        if title is None:
            title, shape, baselines = of, model.shape, maps
        if (of, model.shape) != (title, shape):
            logger.warning(
                "%s: its map of CRPS is left out: it is of another size, or of %s, not of %s", path, of, title
            )
            continue
        named[label] = model
    if not named:
        return {}
    return {"crps_maps": crps_maps(named | baselines, title).save(folder / "crps_maps.png")}


if __name__ == "__main__":
    run_tool(main, make_parser())
