"""What must hold before a change is merged: the method is no worse than consistency distillation."""

import os

from endpoint_distillation import endpoint

from distillbench.testing import assert_no_regression

BUDGET = os.environ.get("BUDGET", "2e5passes")  # small, so that every push can afford it; the nightly job takes S
SEEDS = int(os.environ.get("SEEDS", "3"))


def test_no_worse_than_consistency_distillation():
    # Trains both on the same seeds, as far as the store lacks the runs. Raises with the reasons if worse, or if undecided.
    # The file and not the id: the runs of a file are kept under the hash of its source, so an edit is always trained again.
    assert_no_regression(endpoint.__file__, against="cd", track="mixture2d", budget=BUDGET, seeds=SEEDS, margin="5%")
