"""What commands share: where the decode tokens of a trace are."""

import numpy as np
import pytest

from moetrace import LoadTrace, Workspace, save_trace
from moetrace.workspace.options import decode_of


@pytest.mark.parametrize(
    ("counts", "first", "layers", "there"),
    [
        (np.ones((60, 2, 4), int), 1, [0, 1], True),
        (np.ones((60, 3, 4), int), 1, [0, 1, 2], True),
        (np.ones((90, 2, 4), int), 40, [0, 1], True),
        (np.ones((90, 2, 4), int), 60, [0, 1], True),
        (np.ones((90, 2, 4), int), 61, [0, 1], False),
        (np.ones((60, 1, 4), int), 1, [0], False),
        (np.ones((60, 2, 3), int), 1, [0, 1], False),
    ],
)
def test_decode_lies_beside_a_trace_of_the_same_layers_and_experts(tmp_path, counts, first, layers, there):
    """Of these layers and steps alone, where both have some."""
    place = Workspace(tmp_path)
    trace = LoadTrace.from_counts(2 * np.ones((60, 2, 4), int), name="run")
    steps = np.arange(first, first + len(counts))
    (tmp_path / "traces").mkdir()
    save_trace(LoadTrace.from_counts(counts, steps=steps, layers=layers), place.trace_path("run-decode"))

    found = decode_of(trace, place)

    assert there == (found is not None)
    if found is not None:
        assert ((0, 1), list(range(first, 61))) == (found.layers, found.steps.tolist())
    assert decode_of(trace, Workspace(tmp_path / "elsewhere")) is None
