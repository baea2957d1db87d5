"""How fast are gmoe's layers: ``python -m experiments.benchmark conv|ffn|vit|router|vote|train [options]``."""
