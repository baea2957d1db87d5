"""Training runs and measurements; run from a clone, never installed."""
