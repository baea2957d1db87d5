"""Study: which runs are compared, and what they say together.

studies   A study: rows on columns, beside controls.
running   Runs the cells of a study that have no file yet.
sweep     The command: a study of your own, the table of routers, your row in it.
routers   The table of routers, and your own beside some of its rows.
width     The arms of the study of width, and the graphs on which it is asked what it hangs on.
variants  Packages with fewer labels, classes, or features.
front     What that study found: accuracy at a cost, and where experts win.
published OGB's molecules beside published figures.
price     What the cells of a study would cost.
forces    Forces of several theories, by experts: runs and table of a study of its own, whose
          arms are in potentials.
pages     Puts the tables of studies and benchmarks into the docs.
advise    Asks a graph whether it lacks width, and whether its nodes follow different rules
          (question), and tries the answers.
"""
