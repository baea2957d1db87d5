"""Say whether experts will pay on your data: the command of :mod:`experiments.study.advise`."""

from experiments.study.advise import main

if __name__ == "__main__":
    main()
