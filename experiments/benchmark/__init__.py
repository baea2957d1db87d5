"""How fast is gmoe: ``python -m experiments.benchmark NAME [options]``."""
