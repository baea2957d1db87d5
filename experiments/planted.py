"""Write a planted graph in OGB's layout: the command of :mod:`experiments.convert.planted`."""

from experiments.convert.planted import main

if __name__ == "__main__":
    main()
