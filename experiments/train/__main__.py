"""Train a preset, or your own data, router or model: the command of :mod:`experiments.train.command`."""

from experiments.train.command import main

if __name__ == "__main__":
    main()
