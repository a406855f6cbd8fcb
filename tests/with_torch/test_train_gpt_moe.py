"""The reference run: its experts are right, it records, and it goes on from a checkpoint as if never stopped."""

import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from moetrace import open_trace

ROOT = Path(__file__).parent.parent.parent
sys.path.insert(0, str(ROOT / "sample_traces"))

import train_gpt_moe as run  # noqa: E402 - the script lies in a folder of its own


@pytest.mark.parametrize("counts", [[4, 4, 4, 4], [9, 0, 3, 4], [16, 0, 0, 0], [0, 1, 8, 7]])
def test_grouped_products_are_those_of_each_expert(counts):
    """Padded or one by one, and as the GPU's kernel defines it."""
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(16, 8, generator=generator)
    weights = torch.randn(4, 8, 16, generator=generator)
    expected = torch.cat([part @ matrix for part, matrix in zip(rows.split(counts), weights)])
    ends = torch.tensor(counts).cumsum(0).to(torch.int32)

    torch.testing.assert_close(expected, run.grouped(rows, weights, torch.tensor(counts)))
    kernel = torch._grouped_mm(rows.bfloat16(), weights.bfloat16(), offs=ends)
    torch.testing.assert_close(expected, kernel.float(), atol=0.1, rtol=0.05)


def trained(out, steps):
    """The trace of a tiny run of that many of 12 steps."""
    argv = f"--layers 4 --width 16 --heads 2 --experts 4 --expert-width 8 --vocabulary 300 --length 16 --tokens 128 \
        --micro 64 --warmup 4 --top-k 2 --steps {steps} --save-every 3 --bytes 200000 --out {out} --corpus {ROOT / 'moetrace'}"
    run.train(*run.parsed(argv.split()))
    return open_trace(out)


def test_a_run_that_was_stopped_goes_on_as_if_it_never_was(tmp_path, capsys, monkeypatch):
    """Same counts, all tokens counted in every layer, and a card in the trace."""
    monkeypatch.setattr(run, "rate_at", lambda *_: 1e-3)  # whose course depends on the last step
    whole = trained(tmp_path / "whole.parquet", 8)
    trained(tmp_path / "parts.parquet", 5)
    again = trained(tmp_path / "parts.parquet", 8)

    assert np.array_equal(whole.counts, again.counts)
    assert ((2, 4), 8, 256) == (again.layers, len(again.steps), again.info.tokens_per_step)
    assert ("small", "CC0-1.0", 8) == tuple(again.info.notes[key] for key in ("shape", "licence", "steps"))
    assert "step 8  loss" in capsys.readouterr().out
