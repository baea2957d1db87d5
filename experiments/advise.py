"""Ask a graph whether experts pay, and try the answer: see :mod:`experiments.study.advise`."""

from experiments.study.advise import main

if __name__ == "__main__":
    main()
