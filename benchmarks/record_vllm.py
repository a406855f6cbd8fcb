"""What recording costs in vLLM: tokens per second with and without it, in pairs of runs of one engine on the CPU.

    .venv-systems/bin/python benchmarks/record_vllm.py

The model is a Qwen3-MoE of random weights, small and so the worst case: a pass takes a few milliseconds. Without
recording, the routers have no capture function and passes are not followed, as if the plug-in were not there.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

LAYERS, EXPERTS, TOP_K, VOCABULARY = 8, 64, 4, 4096
CONFIG = {
    "architectures": ["Qwen3MoeForCausalLM"], "model_type": "qwen3_moe", "vocab_size": VOCABULARY, "hidden_size": 128,
    "intermediate_size": 256, "moe_intermediate_size": 64, "num_hidden_layers": LAYERS, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 32, "num_experts": EXPERTS, "num_experts_per_tok": TOP_K,
    "norm_topk_prob": True, "max_position_embeddings": 512, "rms_norm_eps": 1e-6, "rope_theta": 1e4,
    "tie_word_embeddings": False, "torch_dtype": "float32", "hidden_act": "silu", "attention_bias": False,
}  # fmt: skip


def tokens_per_second(llm: Any, seed: int, requests: int) -> tuple[float, float]:
    """By the clock and by processor time, of *requests* prompts of 32 to 128 tokens with 48 new ones, asked at once."""
    from vllm import SamplingParams

    rng = np.random.default_rng(seed)
    prompts = [rng.integers(3, VOCABULARY, rng.integers(32, 128)).tolist() for _ in range(requests)]
    settings = SamplingParams(max_tokens=48, ignore_eos=True, detokenize=False)
    begun, worked = time.perf_counter(), time.process_time()
    llm.generate([{"prompt_token_ids": prompt} for prompt in prompts], settings, use_tqdm=False)
    tokens = sum(len(prompt) + 48 for prompt in prompts)
    return tokens / (time.perf_counter() - begun), tokens / (time.process_time() - worked)


def measure(folder: Path, pairs: int, requests: int) -> np.ndarray:
    """Tokens per second with recording over those without, (pairs, 2), by the clock and by processor time.

    Which of a pair comes first alternates.
    """
    os.environ |= {"MOETRACE_RECORD": str(folder / "run.parquet"), "VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    from vllm import LLM
    from vllm.model_executor.layers.fused_moe.layer import MoERunner

    (folder / "config.json").write_text(json.dumps(CONFIG))
    llm = LLM(
        str(folder), load_format="dummy", skip_tokenizer_init=True, enforce_eager=True, dtype="float32",
        max_model_len=256, max_num_seqs=requests, max_num_batched_tokens=512,
    )  # fmt: skip
    runner = llm.llm_engine.engine_core.engine_core.model_executor.driver_worker.worker.model_runner
    routers = [module.router for module in runner.get_model().modules() if isinstance(module, MoERunner)]
    captures, followed = [router.capture_fn for router in routers], runner.execute_model
    unfollowed = type(runner).execute_model.__get__(runner)

    def run(seed: int, *, recording: bool) -> tuple[float, float]:
        for router, capture in zip(routers, captures):
            router.set_capture_fn(capture if recording else None)
        runner.execute_model = followed if recording else unfollowed
        return tokens_per_second(llm, seed, requests)

    run(0, recording=True)  # the first is slower
    rows = []
    for pair in range(1, pairs + 1):
        found = {recording: run(pair, recording=recording) for recording in ((True, False), (False, True))[pair % 2]}
        rows.append(np.divide(found[True], found[False]))
    return np.array(rows)


def main() -> None:
    """Print the median ratios of the pairs, with intervals from a bootstrap of pairs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=30)
    parser.add_argument("--requests", type=int, default=32, help="at a time")
    options = parser.parse_args()
    # What vLLM prints is not the answer.
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(sys.stderr):
        ratios = measure(Path(folder), options.pairs, options.requests)
    rng = np.random.default_rng(0)
    medians = np.median(ratios[rng.integers(0, len(ratios), (10_000, len(ratios)))], axis=1)
    import vllm

    print(
        "| tokens per second with recording over without | median of pairs | 95% interval: low to high |\n|---|---:|---:|"
    )
    for i, name in enumerate(("by the clock", "by processor time, all threads")):
        low, high = np.quantile(medians[:, i], (0.025, 0.975))
        print(f"| {name} | {np.median(ratios[:, i]):.3f} | {low:.3f} to {high:.3f} |")
    print(
        f"\n{len(ratios)} pairs; {LAYERS} MoE layers of {EXPERTS} experts, top-{TOP_K}, width 128; {options.requests} requests "
        f"at a time; vLLM {vllm.__version__} on a CPU, eager."
    )


if __name__ == "__main__":
    main()
