"""Say what your data want, and whether experts pay: see :mod:`experiments.study.advise`."""

from experiments.study.advise import main

if __name__ == "__main__":
    main()
