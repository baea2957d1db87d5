"""How fast are gmoe's layers: ``python -m experiments.benchmark conv|vit [options]``."""
