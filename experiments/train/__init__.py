"""Train: a run from its configuration to its folder; the other rooms build on this one.

command        The command line of a run: command_line, signals.
config         The options: checks, presets, saved (in files), user_code.
kinds          What differs by kind of data: graphs, molecules, images; a class each.
data           The data sets; files reads each kind of file.
build          The model, its costs, dense models of equal cost; processes are those that train it.
loop           From seeds to batches: training (the step), epoch, progress.
potential      Energies and forces, which the loop does not train.
run_folder     What a run leaves: summary, results, logs, checkpoint.
routing_stats  What the routing of a run follows; scores are figures as text.
"""
