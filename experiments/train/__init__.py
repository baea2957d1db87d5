"""Train: a run from its configuration to its folder; the other rooms build on this one."""
