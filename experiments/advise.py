"""Ask a graph whether rules differ, and try the answer: see :mod:`experiments.study.advise`."""

from experiments.study.advise import main

if __name__ == "__main__":
    main()
