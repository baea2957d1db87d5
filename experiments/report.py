"""Make one HTML page from finished runs: the command of :mod:`experiments.show.report`."""

from experiments.show.report import main

if __name__ == "__main__":
    main()
