"""Print the script by which a shell completes the command latentcast: tools, experiments, overrides, options.

bash: eval "$(latentcast completion bash)" in ~/.bashrc; zsh: the same with zsh in ~/.zshrc, after compinit;
fish: latentcast completion fish > ~/.config/fish/completions/latentcast.fish
"""

import argparse

from latentcast.cli import run_tool


def make_parser():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shell", choices=("bash", "zsh", "fish"))
    return parser


def main(args):
    import argcomplete

    return argcomplete.shellcode(["latentcast"], shell=args.shell)


if __name__ == "__main__":
    run_tool(main, make_parser())
