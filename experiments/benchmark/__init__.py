"""How fast are gmoe's layers: ``python -m experiments.benchmark conv|order|ffn|vit|router|vote|train|swap [options]``."""
