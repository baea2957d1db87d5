"""One page from finished runs: ``python -m experiments.report RUN... --out DIR``."""
