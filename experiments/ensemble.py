"""Score runs on OGB's sets, one by one and together.

The command of :mod:`experiments.show.ensemble`.
"""

from experiments.show.ensemble import main

if __name__ == "__main__":
    main()
