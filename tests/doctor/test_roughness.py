"""Counts that change less from step to step than routed tokens can: where the line is."""

import numpy as np
import pytest

from moetrace.doctor import roughness_findings


def summed(steps_each, n=4000):
    """Counts of routed tokens, each the sum of the last *steps_each* steps."""
    drawn = np.random.default_rng(0).multinomial(200, [0.5, 0.3, 0.2], size=n + steps_each)
    running = np.cumsum(drawn, axis=0)
    return running[steps_each:] - running[:-steps_each]


@pytest.mark.parametrize(("steps_each", "smoothed"), [(1, False), (4, False), (6, True), (10, True)])
def test_sums_over_more_than_five_steps_are_smoothed(steps_each, smoothed):
    """A sum over n steps changes 1 / n times as much as single steps; a fifth is where the line is."""
    counts = summed(steps_each)
    found = roughness_findings(counts, np.arange(1, len(counts) + 1), 3)

    assert ["smoothed"] * smoothed == [finding.name for finding in found]
    assert [pytest.approx(1 / steps_each, rel=0.1)] * smoothed == [float(f.evidence.split()[2]) for f in found]
    assert all("layer 3" == finding.place for finding in found)
