"""Study: which runs are compared, and what they say together.

studies   A study: rows on columns, beside controls; a grid of a preset.
running   Runs the cells of a study that have no file yet.
sweep     The command: a study of your own, a grid, the table of routers, your row in it.
routers   The table of routers; own_router is your row in it, measured what a cell of it holds.
forces    Forces by experts of each element: arms, runs and table of a study of its own.
pages     Puts the tables of studies and benchmarks into the docs.
advise    Asks your own data what they want (questions, by models of probes, on what views
          tell of a node), and compares dense models with experts until the answer is clear.
"""
