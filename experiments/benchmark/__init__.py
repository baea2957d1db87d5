"""How fast is gmoe: ``python -m experiments.benchmark conv|ffn|vit|router|vote|train|swap [options]``."""
