"""Bring a large graph into a folder to train from disk: the command of :mod:`experiments.train.data.convert`."""

from experiments.train.data.convert import main

if __name__ == "__main__":
    main()
