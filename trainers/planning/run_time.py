"""What a run takes beside its steps: starting, compiling, validations, the test, the end. Estimates, as a plan says.

Not counted: preparing the corpus, waiting for nodes, restarts, and stalls by checkpoints (3.7 ms each).
"""

from dataclasses import dataclass

START_SECONDS = 17.0
"""From the command to the first step: imports 4, Ray 10, ours 3 (`python benchmarks/run.py --only resume`)."""
COMPILE_SECONDS = 20.0
"""Forward and backward pass, and once more for evaluation: six shapes took 8 to 18 s of CPU for the first alone."""
END_SECONDS = 15.0
"""Assumed of export, floor, samples, report and Ray's end, of a small model; the floor takes 1 s a MB of text."""
FORWARD_SHARE = 1 / 3
"""Of a step's time, per token: 0.28 to 0.37 of it in six shapes on a CPU."""


@dataclass(frozen=True, kw_only=True)
class Evaluations:
    """What is evaluated, and how often."""

    validations: int = 0
    validation_tokens: int | None = 0
    """Of each; None: the whole split of a corpus that is not prepared yet."""
    test_tokens: int | None = 0
    """The whole test split, once; None as above."""


@dataclass(frozen=True, kw_only=True)
class Beside:
    """Seconds of a run beside its steps."""

    starting: float
    compiling: float
    validating: float
    testing: float
    ending: float

    @property
    def computing(self) -> float:
        """Of the workers: what energy is counted for, as in a report."""
        return self.compiling + self.validating + self.testing

    @property
    def total(self) -> float:
        return self.starting + self.computing + self.ending


def beside_steps(evaluations: Evaluations, seconds_per_token: float, compiles: bool) -> Beside:
    """Of a run whose steps take so long for each token of all workers; what is not known yet counts as nothing."""
    forward = FORWARD_SHARE * seconds_per_token
    return Beside(
        starting=START_SECONDS,
        compiling=COMPILE_SECONDS if compiles else 0.0,
        validating=forward * evaluations.validations * (evaluations.validation_tokens or 0),
        testing=forward * (evaluations.test_tokens or 0),
        ending=END_SECONDS,
    )
