"""Score runs on OGB's sets, one by one and together: the command of :mod:`experiments.study.ensemble`."""

from experiments.study.ensemble import main

if __name__ == "__main__":
    main()
