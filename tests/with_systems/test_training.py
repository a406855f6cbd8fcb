"""Recording the MoE layers of training frameworks themselves, on the CPU, in two processes."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from moetrace import open_trace

PACKAGES = {"megatron-bias": "megatron.core", "megatron": "megatron.core", "torchtitan": "torchtitan"}


@pytest.mark.parametrize("framework", PACKAGES)
def test_counts_are_those_of_the_routers(tmp_path, framework):
    """By the buffers that the framework keeps and by what its routers give back: the sum over both ranks, each token once."""
    if importlib.util.find_spec(PACKAGES[framework].partition(".")[0]) is None:
        pytest.skip(f"{PACKAGES[framework]} is not installed: make test-systems")
    argv = [sys.executable, Path(__file__).with_name("training.py"), framework, tmp_path]
    ranks = [
        subprocess.Popen(
            [*argv, str(rank)], stdout=subprocess.PIPE, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}
        )
        for rank in (0, 1)
    ]
    printed = [process.communicate(timeout=300)[0] for process in ranks]
    assert [0, 0] == [process.returncode for process in ranks]
    expected = sum(np.array(json.loads(text.splitlines()[-1])) for text in printed)

    for name in ("chosen", "buffers") if framework != "megatron" else ("chosen",):
        trace = open_trace(tmp_path / f"{name}.parquet")
        assert (3, 7) == trace.layers, name
        assert np.array_equal(expected, trace.counts), name
