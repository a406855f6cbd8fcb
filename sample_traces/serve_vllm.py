"""Serve a model with vLLM's own engine under a made-up load, and record it by moetrace's plug-in.

The engine schedules, batches, caches and samples as in `vllm serve`; only the requests come from this process, by the
number of the pass, so that a load can be made again. They are passages of several domains of text, whose mix wanders;
arrivals follow a day; one domain dominates for a tenth of the passes. Answers are sampled.

    python sample_traces/train_gpt_moe.py --shape qwen3-moe --top-k 4 --steps 1600 --out my-run.parquet
    python sample_traces/serve_vllm.py --run my-run.parquet --out my-serving.parquet \\
        --domain python=/usr/lib/python3 --domain manuals=/usr/share/doc

Two traces come out: that of all tokens, and beside it that of the decoded ones alone.
"""

from __future__ import annotations

import argparse
import json
import os
from dataclasses import replace
from pathlib import Path

import numpy as np
from serve_gpt_moe import Clients, corpus_of, parsed

from moetrace import open_trace, save_trace


class Load(Clients):
    """Clients whose requests fit a small model, and of whom one has a batch job."""

    def arrivals(self, number: int) -> list[tuple[int, int, int]]:
        """Domain, prompt and answer length of each request that pass *number* brings."""
        job = 0.55 < number / self.options.passes < 0.65
        self.mix[0] += 4 * job
        asked = super().arrivals(number)
        self.mix[0] -= 4 * job
        return [(domain, min(prompt, 300), min(answer, 200)) for domain, prompt, answer in asked]


def serve(options: argparse.Namespace) -> None:
    """Serve the passes asked for, and describe what was recorded of them."""
    os.environ |= {"MOETRACE_RECORD": str(options.out), "VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    from tokenizers import Tokenizer
    from vllm import LLM, SamplingParams

    encoding = Tokenizer.from_file(str(options.run.with_suffix(".tokens.json")))
    folders = dict(text.split("=", 1) for text in options.domain)
    corpora = [corpus_of(encoding, Path(folder), options.bytes) for folder in folders.values()]
    load, rng = Load(list(folders), options), np.random.default_rng([options.seed, 1])
    limits = {"max_num_seqs": options.requests, "max_num_batched_tokens": options.prefill, "max_model_len": 512}
    llm = LLM(
        str(options.run.with_suffix(".model")),
        skip_tokenizer_init=True,
        enforce_eager=True,
        dtype="float32",
        seed=options.seed,
        **limits,
    )
    engine, asked = llm.llm_engine, 0
    for number in range(1, options.passes + 1):
        for domain, prompt, answer in load.arrivals(number):
            start = int(rng.integers(0, len(corpora[domain]) - prompt))
            tokens = corpora[domain][start : start + prompt].tolist()
            asked += 1
            sampling = SamplingParams(temperature=0.8, max_tokens=answer, ignore_eos=True, detokenize=False)
            engine.add_request(str(asked), {"prompt_token_ids": tokens}, sampling)
        engine.step()
        if number % 200 == 0:
            print(f"pass {number:,}: {asked:,} requests, {engine.get_num_unfinished_requests()} unfinished", flush=True)
    engine.engine_core.shutdown()
    notes = {name: getattr(options, name) for name in ("passes", "rate", "day", "prefill", "requests", "seed")}
    notes |= {"domains": list(folders), "asked": asked, "temperature": 0.8, "licence": "CC0-1.0"}
    for path in (options.out, options.out.with_name(f"{options.out.stem}-decode.parquet")):
        trace = open_trace(path)
        save_trace(replace(trace, info=replace(trace.info, notes=trace.info.notes | notes)), path)
    print(json.dumps(notes))


if __name__ == "__main__":
    serve(parsed(about=__doc__, rate=1.0, day=2_500, prefill=512, requests=128))
