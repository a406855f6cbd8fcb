"""The plug-in in vLLM itself, on the CPU: what a server records is what was asked of it, token by token."""

import importlib.util
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("torch", reason="`make test-systems` installs it")
if importlib.util.find_spec("vllm") is None:
    pytest.skip("vLLM is not installed: make test-systems", allow_module_level=True)
from vllm_serve import ENVIRONMENT, VOCABULARY, serving

from moetrace import open_trace, read_trace
from moetrace.formats import ReadOptions
from moetrace.record import read_parts

LAYERS, EXPERTS, TOP_K = 4, 32, 4


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """The folder of a tiny Qwen3-MoE of random weights, as Transformers writes it."""
    import torch
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("models") / "tiny-qwen3-moe"
    config = Qwen3MoeConfig(
        vocab_size=VOCABULARY,
        hidden_size=64,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        num_experts=EXPERTS,
        num_experts_per_tok=TOP_K,
        moe_intermediate_size=32,
        norm_topk_prob=True,
        max_position_embeddings=512,
    )
    Qwen3MoeForCausalLM(config).save_pretrained(folder)
    return folder


def tokens_of(answers):
    """The tokens that the server computed for *answers*, and those of them that it decoded: the last is not fed back."""
    usage = [answer["usage"] for answer in answers]
    decoded = sum(used["completion_tokens"] - 1 for used in usage)
    return sum(used["prompt_tokens"] for used in usage) + decoded, decoded


def totals(trace):
    """The choices of all passes in each layer, shape (layers,)."""
    return trace.counts.sum(axis=(0, 2)).tolist()


def test_a_server_records_what_was_asked_of_it(model, tmp_path):
    """Prompts longer than a pass, more requests than a batch, a pause; not warm-up, and no token twice."""
    path = tmp_path / "run.parquet"
    lengths = [(int(5 + 37 * i % 200), int(2 + 5 * i % 40)) for i in range(24)]
    with serving(model, tmp_path / "log", MOETRACE_RECORD=str(path)) as server:
        answers = server.ask(lengths)
        path.with_suffix(".pause").touch()
        server.logged("recording is paused")
        server.ask(lengths[:4], seed=1)
        path.with_suffix(".pause").unlink()
        server.logged("recording goes on")
        answers += server.ask(lengths[:8], seed=2)
        server.stop()
    computed, decoded = tokens_of(answers)
    trace, decode = open_trace(path), open_trace(tmp_path / "run-decode.parquet")

    assert [TOP_K * computed] * LAYERS == totals(trace)
    assert [TOP_K * decoded] * LAYERS == totals(decode)
    assert ((0, 1, 2, 3), EXPERTS, TOP_K, "tiny-qwen3-moe") == (
        trace.layers,
        trace.experts,
        trace.info.top_k,
        trace.info.model,
    )
    assert max(np.diff(trace.steps)) > 1 == min(np.diff(trace.steps))  # the pause, and each pass by its number
    for phase, expected in (("decode", decoded), ("prefill", computed - decoded)):
        found = read_trace(path, options=ReadOptions(settings={"phase": phase}))
        assert [TOP_K * expected] * LAYERS == totals(found)


def test_of_two_tensor_parallel_workers_one_records(model, tmp_path):
    """Both see the same tokens."""
    path = tmp_path / "run.parquet"
    lengths = [(int(5 + 37 * i % 200), int(2 + 5 * i % 40)) for i in range(12)]
    settings = {"MOETRACE_RECORD": str(path), "VLLM_CPU_OMP_THREADS_BIND": "0|1"}
    with serving(model, tmp_path / "log", "--tensor-parallel-size", "2", **settings) as server:
        computed, decoded = tokens_of(server.ask(lengths))
        server.stop()

    assert [TOP_K * computed] * LAYERS == totals(open_trace(path))
    assert [TOP_K * decoded] * LAYERS == totals(open_trace(tmp_path / "run-decode.parquet"))
    assert 2 == len(list(tmp_path.glob("*.parquet")))


def test_a_server_that_was_killed_goes_on(model, tmp_path):
    """What was written before the kill stays, what is asked afterwards follows; at most the last seconds are lost."""
    path = tmp_path / "run.parquet"
    lengths = [(10 + i, 40) for i in range(4)]
    with serving(model, tmp_path / "log", MOETRACE_RECORD=str(path)) as server:
        computed, _ = tokens_of(server.ask(lengths))
        time.sleep(12)
        server.ask(lengths, seed=2)
        server.kill()
    before = read_parts(path.with_suffix(".parts"))
    kept, last = before.counts.copy(), int(before.steps[-1])
    with serving(model, tmp_path / "log", MOETRACE_RECORD=str(path)) as server:
        again, _ = tokens_of(server.ask(lengths, seed=1))
        server.stop()
    trace = open_trace(path)

    assert TOP_K * computed <= kept[:, 0].sum() < 2 * TOP_K * computed
    assert np.array_equal(kept, trace.counts[: len(kept)])
    assert [TOP_K * again] * LAYERS == trace.counts[len(kept) :].sum(axis=(0, 2)).tolist()
    assert list(range(1, len(trace.steps) + 1)) == trace.steps.tolist()
    assert last == len(kept)


OFFLINE = """
import json, os, sys
import numpy as np
os.environ["MOETRACE_RECORD"] = sys.argv[2]
from vllm import LLM, SamplingParams
if __name__ == "__main__":
    llm = LLM(sys.argv[1], skip_tokenizer_init=True, enforce_eager=sys.argv[3] == "eager", max_model_len=256,
              max_num_batched_tokens=128, max_num_seqs=8, dtype="float32")
    rng = np.random.default_rng(0)
    prompts = [rng.integers(3, 512, length).tolist() for length in (5, 60, 150, 31, 2, 90, 40, 77, 12, 3)]
    settings = SamplingParams(max_tokens=20, ignore_eos=True, detokenize=False)
    asked = [{"prompt_token_ids": prompt} for prompt in prompts]
    print(json.dumps([[*prompt, *answer.outputs[0].token_ids]
                      for prompt, answer in zip(prompts, llm.generate(asked, settings, use_tqdm=False))]))
"""


def offline(script, model, path, mode, **environment):
    """Run *script* in a process of its own, which vLLM shares."""
    file = path.with_name("offline.py")
    file.write_text(script)
    environment = {**os.environ, **ENVIRONMENT, "VLLM_ENABLE_V1_MULTIPROCESSING": "0", **environment}
    return subprocess.run([sys.executable, file, model, path, mode], env=environment, capture_output=True, text=True)


@pytest.mark.parametrize("mode", ["eager", "compiled"])
def test_offline_counts_are_those_of_transformers(model, tmp_path, mode):
    """Each expert of each layer, by the router of another implementation on the same tokens."""
    import torch
    from transformers import Qwen3MoeForCausalLM

    path = tmp_path / "run.parquet"
    (tmp_path / "offline.py").write_text(OFFLINE)
    every = 1 if mode == "eager" else 2
    environment = {
        **os.environ,
        **ENVIRONMENT,
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "MOETRACE_RECORD_EVERY": str(every),
    }
    argv = [sys.executable, tmp_path / "offline.py", model, path, mode]
    done = subprocess.run(argv, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    sequences = json.loads(done.stdout.splitlines()[-1])
    trace = read_parts(path.with_suffix(".parts"))  # the engine was not shut down
    expected = np.zeros((LAYERS, EXPERTS), int)
    with torch.no_grad():
        reference = Qwen3MoeForCausalLM.from_pretrained(model, dtype=torch.float32)
        for tokens in sequences:
            logits = reference(torch.tensor([tokens[:-1]]), output_router_logits=True).router_logits
            for layer, scores in enumerate(logits):
                expected[layer] += np.bincount(scores.topk(TOP_K).indices.ravel().numpy(), minlength=EXPERTS)

    if every == 1:
        assert expected.sum(axis=1).tolist() == totals(trace)
        # The two add up in other orders: of thousands of choices a few that are nearly tied may differ.
        assert np.abs(trace.counts.sum(axis=0) - expected).sum() <= 0.002 * expected.sum()
    else:
        assert (trace.steps % 2 == 0).all()
        assert (np.diff(trace.steps) == 2).all()
        assert len(set(totals(trace))) == 1


def test_a_model_without_experts_is_refused(tmp_path):
    """With a line that says what to do."""
    from transformers import Qwen3Config

    config = Qwen3Config(
        vocab_size=512, hidden_size=64, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2, head_dim=32
    )
    config.architectures = ["Qwen3ForCausalLM"]
    config.save_pretrained(tmp_path / "dense")
    script = OFFLINE.replace("skip_tokenizer_init", "load_format='dummy', skip_tokenizer_init")
    done = offline(script, tmp_path / "dense", tmp_path / "run.parquet", "eager")

    assert 0 != done.returncode
    assert "MOETRACE_RECORD: the model has no MoE layers; unset it" in done.stderr


def test_the_sample_scripts_train_serve_and_record(tmp_path):
    """A model of Transformers, trained by one script, is served by the other: every layer has all tokens, and a card."""
    root = Path(__file__).parent.parent.parent
    run, out = tmp_path / "run.parquet", tmp_path / "serving.parquet"
    shape = (
        "--shape qwen3-moe --layers 2 --width 64 --heads 2 --experts 8 --expert-width 16 --vocabulary 400 --length 128"
    )
    train = f"train_gpt_moe.py {shape} --tokens 256 --micro 256 --top-k 2 --steps 3 --bytes 200000 --out {run} --corpus {root}/docs"
    domains = f"--domain code={root}/moetrace/record --domain docs={root}/docs --bytes 50000"
    serve = f"serve_vllm.py --run {run} --out {out} {domains} --passes 120 --rate 0.5 --requests 16 --prefill 128"
    for script in (train, serve):
        argv = [sys.executable, *f"{root}/sample_traces/{script}".split()]
        done = subprocess.run(argv, env={**os.environ, **ENVIRONMENT}, capture_output=True, text=True)
        assert 0 == done.returncode, done.stderr[-3000:]
    trained, every, decode = (open_trace(path) for path in (run, out, tmp_path / "serving-decode.parquet"))
    tokens = every.counts.sum(axis=2)

    assert ((0, 1), 8, 512) == (trained.layers, trained.experts, trained.info.tokens_per_step)
    assert ((0, 1), 8, 2) == (every.layers, every.experts, every.info.top_k)
    assert (tokens[:, 0] == tokens[:, 1]).all()
    assert 2 * 128 == tokens.max()
    assert decode.counts.sum(axis=2).max() <= 2 * 16
    assert ["code", "docs"] == every.info.notes["domains"]
