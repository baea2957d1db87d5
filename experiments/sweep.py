"""Run a study: the command of :mod:`experiments.study.sweep`."""

from experiments.study.sweep import main

if __name__ == "__main__":
    main()
