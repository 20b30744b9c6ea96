"""Predictions of a posterior on data, and their quality."""

# The ways to predict that `eval --rows` names: the paper's, and those that a recommendation adds. The CLI's help has
# them, so they stand where nothing else is imported.
PAPER_VARIANTS = ("base", "mean", "mean-pruned", "posterior", "posterior-pruned")
ADDED_VARIANTS = ("mean+temperature", "posterior+temperature", "recommended")
