"""Write a planted graph in OGB's layout: the command of :mod:`experiments.study.planted`."""

from experiments.study.planted import main

if __name__ == "__main__":
    main()
