"""Print an experiment as a stage's tool composes it: all keys, with the overrides, as YAML.

What is printed is an experiment file itself. Values that are still to be given stand there as ???.
"""

from latentcast.cli import experiment_parser, run_tool

STAGES = ("tokenizer", "prior")


def make_parser():
    parser = experiment_parser(__doc__)
    parser.add_argument("--stage", default="prior", choices=STAGES, help="whose sections of it count (default: prior)")
    return parser


def main(args):
    from latentcast.config import stage_config, to_container
    from latentcast.yaml_text import dump

    return dump(to_container(stage_config(args.experiment, args.overrides, args.stage), whole=False)).rstrip()


if __name__ == "__main__":
    run_tool(main, make_parser())
