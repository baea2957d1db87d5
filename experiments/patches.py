"""Draw which expert takes which patch of your images: the command of :mod:`experiments.show.patches`."""

from experiments.show.patches import main

if __name__ == "__main__":
    main()
