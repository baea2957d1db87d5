"""The commands of the experiments; ``python -m experiments.NAME --help`` explains one.

train      Train a preset, or your own data, router or model.
sweep      Run a study, or a grid of your own.
advise     Ask a graph whether rules differ, and try experts that are routed so.
report     Make one HTML page from finished runs.
patches    Draw which expert takes which patch of your images.
tables     Write the tables of the docs from result files, or check them.
benchmark  Time layers, routers, and training.
convert    Bring a large graph into a folder to train from disk, or SMILES into OGB's layout.
planted    Write a planted graph in OGB's layout, where OGB's own cannot be had.
"""

print(__doc__)
