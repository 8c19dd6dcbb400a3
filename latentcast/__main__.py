"""``python -m latentcast``: the command ``latentcast``."""

from latentcast.command import main

if __name__ == "__main__":
    main()
