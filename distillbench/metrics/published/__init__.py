"""The metrics that papers quote: FID on Inception-2015, CLIP score, HPSv2. They need weights that are not shipped.

Each needs the extra `published` and a file of `distillbench.published_weights`. Without the file a score is `not_run(...)`: no value, and
the note says why. docs/metrics-published.md has the definitions, and the numbers of other conventions that must not be mixed with these.
"""

from __future__ import annotations

from ..score import Score, identity

NOT_RUN = "not run: weights missing"


def not_run(name: str, n: int, *, higher_is_better: bool | None) -> Score:
    """The cell of a metric whose weights are missing: `name` as in "fid/clean-inception2015@299", n generated images."""
    return Score(name, identity(name, estimator=NOT_RUN, n_generated=n), None, None, None, n, higher_is_better, note=NOT_RUN)


def first_line(error: Exception) -> str:
    """Of a foreign package's message, for one of our own lines."""
    return (str(error).splitlines() or [""])[0][:160] or type(error).__name__
