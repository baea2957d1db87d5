"""Generate the tables of the docs from result files: the command of :mod:`experiments.study.pages`."""

from experiments.study.pages import main

if __name__ == "__main__":
    main()
