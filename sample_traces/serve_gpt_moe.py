"""Serve texts of several domains with a model of `train_gpt_moe.py`, and record the expert load of every pass.

A server with continuous batching: requests arrive at random, by day and night; prompts are prefilled in chunks;
every request that is decoding gets one token a pass. Routing is real: the experts of each token are those that the
model chooses in a window of its text. Answers are the text's own (teacher-forced), so nothing is sampled, and the
load is that of a server, made up: who asks how much, and when.

    python sample_traces/serve_gpt_moe.py --run my-run.parquet --out my-serving.parquet \\
        --domain python=/usr/lib/python3 --domain manuals=/usr/share/doc

The run is given by its trace: its checkpoint, its encoding and its shape lie beside it. Two traces come out: that of
all tokens, and beside it that of the decoded ones alone; the difference is prefill.
"""

from __future__ import annotations

import argparse
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from train_gpt_moe import GPT, Shape, texts

from moetrace import open_trace
from moetrace.record import Recorder

Routes = NDArray[np.int16]
"""The experts of each token, (layers, tokens, top_k)."""


# --- the model, asked for its choices only ----------------------------------------------------------------------


def restored(run: Path) -> tuple[GPT, Shape]:
    """The model of a finished or stopped run, by the card in its trace."""
    notes = open_trace(run).info.notes
    shape = Shape(**{name: notes[name] for name in Shape.__dataclass_fields__})
    model = GPT(shape, notes["top_k"])
    state = torch.load(run.with_suffix(".checkpoint.pt"), weights_only=True, map_location="cpu")
    model.load_state_dict(state["model"])
    return model.eval(), shape


@torch.inference_mode()
def routes_of(model: GPT, shape: Shape, tokens: NDArray[np.uint16]) -> Routes:
    """What every MoE layer chooses for each of *tokens*, in windows of the model's length."""
    whole = len(tokens) - len(tokens) % shape.length
    padded = (
        np.append(tokens, np.zeros(shape.length + whole - len(tokens), np.uint16)) if whole < len(tokens) else tokens
    )
    windows = torch.from_numpy(padded.astype(np.int64)).view(-1, shape.length)
    # The model predicts the token after each: one more at the end, which is not looked at.
    model(torch.cat([windows, windows[:, :1]], dim=1))
    chosen = [layer.chosen.numpy()[: len(tokens)] for layer in model.moe.values()]
    return np.stack(chosen).astype(np.int16)


# --- the load -----------------------------------------------------------------------------------------------------


@dataclass
class Request:
    """The routes of a passage, how much of it is the prompt, and how much was served."""

    routes: Routes
    prompt: int
    served: int = 0

    def take(self, most: int) -> Routes:
        """The routes of the next tokens, at most *most*; they are served."""
        part = self.routes[:, self.served : self.served + most]
        self.served += part.shape[1]
        return part


class Clients:
    """Who asks: how many requests a pass brings, of which domain, how long; seeded."""

    def __init__(self, domains: Sequence[str], options: argparse.Namespace) -> None:
        self.domains, self.options = domains, options
        self.rng = np.random.default_rng(options.seed)
        self.mix = self.rng.normal(0, 1, len(domains))

    def arrivals(self, number: int) -> list[tuple[int, int, int]]:
        """Domain, prompt and answer length of each request that pass *number* brings."""
        day = 1 + 0.5 * np.sin(2 * np.pi * number / self.options.day)
        # An Ornstein-Uhlenbeck walk: the mix wanders, and never leaves.
        self.mix += -self.mix / self.options.day + np.sqrt(2 / self.options.day) * self.rng.normal(0, 1, len(self.mix))
        share = np.exp(self.mix) / np.exp(self.mix).sum()
        return [
            (int(self.rng.choice(len(share), p=share)), self._length(16, 2048, 200), self._length(8, 512, 90))
            for _ in range(self.rng.poisson(self.options.rate * day))
        ]

    def _length(self, low: int, high: int, middle: int) -> int:
        return int(np.clip(self.rng.lognormal(np.log(middle), 0.8), low, high))


class Server:
    """Continuous batching: chunked prefill, and one token a pass for every request that decodes."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.waiting: deque[Request] = deque()
        self.decoding: list[Request] = []

    def step(self) -> tuple[Routes | None, Routes | None]:
        """One pass: the routes of what was decoded and of what was prefilled, None where nothing was."""
        decoded = [request.take(1) for request in self.decoding]
        self.decoding = [request for request in self.decoding if request.served < request.routes.shape[1]]
        prefilled, room = [], self.options.prefill
        while self.waiting and room > 0 and len(self.decoding) < self.options.requests:
            first = self.waiting[0]
            prefilled.append(first.take(min(room, first.prompt - first.served)))
            room -= prefilled[-1].shape[1]
            if first.served == first.prompt:
                self.decoding.append(self.waiting.popleft())
        return tuple(np.concatenate(parts, axis=1) if parts else None for parts in (decoded, prefilled))  # type: ignore[return-value]


def serve(options: argparse.Namespace) -> None:
    """Serve the passes asked for, and record them."""
    from tokenizers import Tokenizer

    model, shape = restored(options.run)
    encoding = Tokenizer.from_file(str(options.run.with_suffix(".tokens.json")))
    folders = dict(text.split("=", 1) for text in options.domain)
    corpora = [corpus_of(encoding, Path(folder), options.bytes) for folder in folders.values()]
    clients, server, rng = Clients(list(folders), options), Server(options), np.random.default_rng([options.seed, 1])
    layers = list(model.moe)
    told = {"model": f"GPT of {options.run.stem}, serving", "top_k": model.moe[layers[0]].top_k}
    notes = {"domains": list(folders), **{name: getattr(options, name) for name in LOAD}, "licence": "CC0-1.0"}
    decode = options.out.with_name(f"{options.out.stem}-decode{options.out.suffix}")
    with Recorder(options.out, notes=notes, **told) as every, Recorder(decode, notes=notes, **told) as decoded:
        for number in range(1, options.passes + 1):
            for domain, prompt, answer in clients.arrivals(number):
                corpus = corpora[domain]
                length = min(prompt + answer, len(corpus))
                start = int(rng.integers(0, len(corpus) - length + 1))
                routes = routes_of(model, shape, corpus[start : start + length])
                server.waiting.append(Request(routes, min(prompt, length - 1)))
            phases = server.step()
            for recorder, parts in ((every, phases), (decoded, phases[:1])):
                record(recorder, number, layers, shape.experts, [part for part in parts if part is not None])
            if number % 200 == 0:
                print(f"pass {number:,}: {len(server.decoding)} decoding, {len(server.waiting)} waiting", flush=True)


def record(recorder: Recorder, number: int, layers: Sequence[int], experts: int, parts: Sequence[Routes]) -> None:
    """Count what was chosen in a pass; one without a token is no step."""
    if not parts:
        return
    routes = np.concatenate(parts, axis=1)
    for layer, chosen in zip(layers, routes):
        recorder.add(layer, np.bincount(chosen.ravel(), minlength=experts))
    recorder.step(number)


def corpus_of(encoding: object, folder: Path, limit: int) -> NDArray[np.uint16]:
    """The text under *folder* as tokens."""
    pieces = [np.array(encoding.encode(text).ids, np.uint16) for text in texts([folder], limit)]  # type: ignore[attr-defined]
    if not sum(map(len, pieces)):
        raise SystemExit(f"no text files under {folder}")
    return np.concatenate(pieces)


LOAD = ("passes", "rate", "day", "prefill", "requests", "seed")
"""The options that make the load."""


def parsed(argv: list[str] | None = None, about: str | None = __doc__, **defaults: float) -> argparse.Namespace:
    """The options of a script that says what it is *about*; *defaults* are those of its own."""
    parser = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, required=True, help="the trace of the run whose model serves")
    parser.add_argument("--out", type=Path, default=Path("serving.parquet"), help="the trace of all tokens")
    parser.add_argument("--domain", action="append", required=True, metavar="NAME=FOLDER", help="texts of a domain")
    parser.add_argument("--bytes", type=int, default=2_000_000, help="bytes of text of a domain at most")
    parser.add_argument("--passes", type=int, default=10_000)
    parser.add_argument("--rate", type=float, default=6.0, help="requests a pass, on average")
    parser.add_argument("--day", type=int, default=4_000, help="passes from one noon to the next")
    parser.add_argument("--prefill", type=int, default=2_048, help="prompt tokens of a pass at most")
    parser.add_argument("--requests", type=int, default=640, help="requests decoding at a time at most")
    parser.add_argument("--seed", type=int, default=0)
    parser.set_defaults(**defaults)
    options = parser.parse_args(argv)
    if any("=" not in text for text in options.domain):
        parser.error("a --domain is NAME=FOLDER")
    return options


if __name__ == "__main__":
    serve(parsed())
