"""Training runs and measurements; run from a clone, never installed.

Five rooms. Each imports from those to its left alone::

    train  <-  convert  <-  show  <-  benchmark  <-  study

train      A run: configuration, presets, data, model, loop, run folder.
convert    Data made into files to train from; a run only reads these.
show       Finished runs: tables, the report, pictures.
benchmark  Times and costs of training steps.
study      Many runs: which are compared, and what they say together.

``train``, ``convert`` and ``benchmark`` are commands themselves. The modules beside the rooms are
the other commands, each a door to the module that does the work.
"""
