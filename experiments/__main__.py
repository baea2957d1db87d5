"""The commands of the experiments; ``python -m experiments.NAME --help`` explains one.

train      Train a preset, or your own data, router or model.
sweep      Run a study: rows on columns, beside controls.
advise     Ask a graph whether it lacks width, and whether rules differ; then try experts.
report     Make one HTML page from finished runs.
patches    Draw which expert takes which patch of your images.
tables     Write the tables of the docs from result files, or check them.
benchmark  Time training steps of whole models.
convert    Bring SMILES into OGB's layout, or into configurations with forces.
"""

print(__doc__)
