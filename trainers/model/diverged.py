"""The error of a model whose outputs are not finite."""

from cluster.console.errors import UserError

LOWER_RATE = "lower optimizer.learning_rate, and choose a new run.name"
"""What helps a run that has diverged."""


class DivergedModelError(UserError, ValueError):
    """A model's outputs or its loss are NaN or infinite, so that it has no score: its likeliest label or token is an
    accident of their order."""
