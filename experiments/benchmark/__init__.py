"""How fast is gmoe: ``python -m experiments.benchmark conv|order|ffn|vit|router|vote|train|swap [options]``."""
