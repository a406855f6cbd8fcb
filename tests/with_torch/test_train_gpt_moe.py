"""The reference run: its experts are right, it records, and it goes on from a checkpoint as if never stopped."""

import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from moetrace import open_trace

ROOT = Path(__file__).parent.parent.parent
sys.path.insert(0, str(ROOT / "sample_traces"))

import serve_gpt_moe as serve  # noqa: E402 - the scripts lie in a folder of their own
import train_gpt_moe as run  # noqa: E402


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


def served(tmp_path, **more):
    """The two traces that a server with the model of a tiny run leaves, and the run's."""
    run_trace = trained(tmp_path / "run.parquet", 3)
    argv = ["--run", tmp_path / "run.parquet", "--out", tmp_path / "serving.parquet", "--passes", 60, "--rate", 1.5]
    argv += ["--domain", f"code={ROOT / 'moetrace' / 'cli'}", "--domain", f"docs={ROOT / 'docs'}", "--bytes", 100_000]
    argv += ["--prefill", 256, "--requests", 20]
    serve.serve(serve.parsed([str(part) for part in argv]))
    return run_trace, open_trace(tmp_path / "serving.parquet"), open_trace(tmp_path / "serving-decode.parquet")


def test_a_server_records_every_token_once_in_every_layer(tmp_path):
    """Prefill is bounded, decoding is a part of all, and the layers are those of the run."""
    run_trace, every, decoded = served(tmp_path)
    totals = every.counts.sum(axis=2)
    at = np.searchsorted(every.steps, decoded.steps)
    decoding = decoded.counts.sum(axis=2)[:, 0]

    assert (run_trace.layers, run_trace.experts) == (every.layers, every.experts)
    assert (totals == totals[:, :1]).all()
    assert (decoding <= 2 * 20).all()
    assert (totals[at, 0] - decoding <= 2 * 256).all()
    assert (every.counts[at] >= decoded.counts).all()


def test_routes_are_those_of_the_model_in_its_windows(tmp_path):
    """A token's experts do not depend on what follows its window, nor on how long the passage is."""
    trained(tmp_path / "run.parquet", 3)
    model, shape = serve.restored(tmp_path / "run.parquet")
    tokens = np.random.default_rng(0).integers(0, shape.vocabulary, 50).astype(np.uint16)
    whole, part = serve.routes_of(model, shape, tokens), serve.routes_of(model, shape, tokens[:32])

    assert (len(model.moe), 50, 2) == whole.shape
    assert np.array_equal(whole[:, :32], part)
