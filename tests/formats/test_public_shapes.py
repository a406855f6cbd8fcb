"""Shapes of public reports: equal counts, or the question, and each way out that is printed leads to equal counts.

docs/formats.md names the report of each.
"""

import base64
import io
import json
from typing import Any

import numpy as np
import pandas as pd
import pytest

from moetrace import open_trace
from moetrace.formats.readers.text import USUAL

RNG = np.random.default_rng(3)
COUNTS = RNG.multinomial(4096, RNG.dirichlet(np.ones(16)), size=(6, 3))  # (steps, layers, experts)
CHOICES = RNG.gumbel(size=(480, 3, 16)).argsort(axis=2)[..., -4:]  # (tokens, layers, k)


def tally(choices):
    return np.stack([np.bincount(choices[:, layer].ravel(), minlength=16) for layer in range(3)])[None]


TALLY = tally(CHOICES)


def jsonl(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def torch_file(path, value):
    torch = pytest.importorskip("torch")
    torch.save(value(torch), path)
    return path


def npy(path, array):
    np.save(path, array)
    return path


def npz(path, **arrays):
    np.savez(path, **arrays)
    return path


def document(path, value):
    path.write_text(json.dumps(value))
    return path


def csv(path, frame):
    frame.to_csv(path, index=False)
    return path


def by_token(key):
    """A line for each token and layer."""
    return [{key: t, "layer": layer, "experts": CHOICES[t, layer].tolist()} for t, layer in np.ndindex(480, 3)]


def ranks(key, steps=6):
    """A line for each step, layer and rank, with the counts of its own four experts."""
    own = {"step": 1, "layer": 0, key: 0, "ep_size": 4, "tokens_per_expert": []}
    places = np.ndindex(steps, 3, 4)
    lists = [(s, j, r, COUNTS[s, j, 4 * r : 4 * r + 4].tolist()) for s, j, r in places]
    return [{**own, "step": s + 1, "layer": j, key: r, "tokens_per_expert": counts} for s, j, r, counts in lists]


def wide(scale=1.0, name="share/layer_{}_expert_{}"):
    columns = [name.format(j, e) for j, e in np.ndindex(3, 16)]
    frame = pd.DataFrame(COUNTS.reshape(6, -1) * scale, columns=columns)
    frame.insert(0, "Step", range(1, 7))
    return frame


def long(*extra):
    frame = pd.DataFrame([(s + 1, j, e, COUNTS[s, j, e]) for s, j, e in np.ndindex(COUNTS.shape)])
    frame.columns = ["step", "layer", "expert", "tokens"]
    return frame.assign(**dict(extra))


def per_token(value):
    """Base64 of a whole .npy, as vLLM answers."""
    sink = io.BytesIO()
    np.save(sink, value.astype(np.uint8))
    return base64.b64encode(sink.getvalue()).decode()


def sglang(value):
    meta = {"prompt_tokens": 5, "completion_tokens": len(value) - 4}
    return {"meta_info": {**meta, "routed_experts": base64.b64encode(value.astype(np.int32).tobytes()).decode()}}


def request(*passes):
    """A request as MoE_expert_selection_trace has it: layers 1, 3 and 5 of six are MoE layers."""
    layers = [{str(2 * j + 1): rows[:, j].tolist() for j in range(3)} for rows in passes]
    return [{**dict.fromkeys(("0", "2", "4")), **own} for own in layers]


def text(path, lines):
    path.write_text("\n".join(lines) + "\n")
    return path


def picks(start, end):
    """A row for each choice."""
    return [f"{j},{e}" for t in range(start, end) for j in range(3) for e in CHOICES[t, j]]


def scrape(step, name="moe:tokens_total", model="m"):
    """What an endpoint shows after so many steps: counters of two engines."""
    total = COUNTS[: step + 1].sum(axis=0)
    halves = [(COUNTS[: step + 1] // 2).sum(axis=0)]
    engines = [halves[0], total - halves[0]]
    labels = [(r, j, e) for r in range(2) for j, e in np.ndindex(3, 16)]
    lines = [
        f'{name}{{engine="{r}",model="{model}",layer="{j}",expert="{e}"}} {engines[r][j, e]:.1f}' for r, j, e in labels
    ]
    return [f"# TYPE {name} counter", 'up{job="x"} 1', *lines]


ONE = TALLY
WINDOW = COUNTS[:1]
PHASES = long(("phase", np.where(np.arange(6 * 48) // 48 % 2, "decode", "prefill")))
TWO = np.concatenate([long(("rank", 0)), long(("rank", 1))])
STATS = {"enabled": True, "layers": [{"layer_id": j, "expert_counts": COUNTS[0, j].tolist()} for j in range(3)]}
ATLAS = {"schema": "v2", "layers": {str(3 + j): {"topk": CHOICES[:, j].tolist(), "score": 0.5} for j in range(3)}}
MAP = (CHOICES[..., None] == np.arange(16)).any(axis=2)
HALVES = [CHOICES[:200], CHOICES[200:]]
SERVED = np.stack([RNG.multinomial(n, np.arange(1, 9) / 36) + 1 for n in RNG.integers(20, 900, 400)])
EACH = np.stack([[np.bincount(half[:, j].ravel(), minlength=16) for j in range(3)] for half in HALVES])
CASES: dict[str, Any] = {
    "ids in .pt, by its name": (lambda p: torch_file(p / "routed_experts.pt", lambda t: t.tensor(CHOICES)), [
        ([], "--tokens N"), (["--tokens", 480], ONE)]),
    "ids in a dict in .pt": (lambda p: torch_file(p / "x.pt", lambda t: {"routed_experts": t.tensor(CHOICES)}), [
        ([], "--tokens N"), (["--tokens", 480], ONE)]),
    "ids in .pt without a name": (lambda p: torch_file(p / "x.pt", lambda t: t.tensor(CHOICES)), [
        ([], "--from routing"), (["--axes", "steps,layers,experts"], "--from routing"), (["--from", "routing", "--tokens", 480], ONE)]),
    "padded ids in .npz": (lambda p: npz(p / "x.npz", a=np.where(np.arange(480)[:, None, None] < 8, CHOICES, -1)), [
        ([], "--from routing")]),
    "ids in a document": (lambda p: document(p / "x.json", CHOICES.tolist()), [
        ([], "--from routing"), (["--from", "routing", "--tokens", 480], ONE)]),
    "ids in lines with tokens": (lambda p: jsonl(p / "x.jsonl", by_token("tok")), [
        ([], "--tokens N"), (["--tokens", 480], ONE), (["--column", "step=tok"], "has no setting")]),
    "ids in lines with steps": (lambda p: jsonl(p / "x.jsonl", by_token("step")), [
        ([], "--from routing"), (["--column", "tokens=experts"], "--from routing")]),
    "ids beside weights": (lambda p: jsonl(p / "x.jsonl", [{**row, "weights": [0.4, 0.3, 0.2, 0.1]} for row in by_token("step")]), [
        ([], "--from routing")]),
    "ids side by side": (lambda p: csv(p / "x.csv", pd.DataFrame(CHOICES[:, 0], columns=[f"expert_{k}" for k in range(4)]).assign(step=range(480))), [
        ([], "--from routing")]),
    "passes of a server": (lambda p: csv(p / "x.csv", pd.DataFrame(SERVED, columns=[f"expert_{e}" for e in range(8)]).assign(step=range(400))), [
        ([], SERVED[:, None])]),
    "passes of a server in lines": (lambda p: jsonl(p / "x.jsonl", [{"step": s, "counts": row} for s, row in enumerate(SERVED.tolist())]), [
        ([], SERVED[:, None])]),
    "a map side by side": (lambda p: csv(p / "x.csv", pd.DataFrame(MAP[:, 0].astype(int), columns=[f"expert_{e}" for e in range(16)]).assign(step=range(480))), [
        ([], "--bin N"), (["--bin", 480], ONE[:, :1])]),
    "ids of layers in .npz": (lambda p: npz(p / "x.npz", **{f"layer_{j}": CHOICES[:, j] for j in range(3)}), [
        ([], "--from routing"), (["--from", "routing", "--tokens", 480], ONE)]),
    "ids of requests": (lambda p: jsonl(p / "x.jsonl", [{"request": i, "experts": half.tolist()} for i, half in enumerate(HALVES)]), [
        ([], "--from routing --tokens N"), (["--from", "routing", "--tokens", 480], ONE)]),
    "one-hot map": (lambda p: npy(p / "x.npy", MAP), [([], "--bin N"), (["--bin", 480], ONE)]),
    "probabilities": (lambda p: npy(p / "x.npy", RNG.dirichlet(np.ones(16), size=(480, 3))), [
        ([], "scores of the router"), (["--tokens-per-step", 2], "not a whole count")]),
    "logits": (lambda p: torch_file(p / "x.pt", lambda t: tuple(t.randn(480, 16) for _ in range(3))), [([], "scores of the router")]),
    "one window": (lambda p: npy(p / "weight.npy", COUNTS[0]), [
        ([], "--axes layers,experts"), (["--axes", "layers,experts"], WINDOW), (["--axes", "steps,experts"], COUNTS[0][:, None])]),
    "no header": (lambda p: text(p / "x.csv", [",".join(map(str, row)) for row in COUNTS[0]]), [([], "has no header")]),
    "rows of other kinds between": (lambda p: document(p / "x.json", [{"op": "a"}, *({"op": "b", "step": s + 1, "layer": j, "counts": COUNTS[s, j].tolist()} for s, j in np.ndindex(6, 3))]), [
        ([], "--where COLUMN=VALUE"), (["--where", "op=b"], COUNTS)]),
    "one window of vLLM": (lambda p: torch_file(p / "expert_load_view.pt", lambda t: t.tensor(COUNTS[0])), [([], WINDOW)]),
    "layers numbered beside": (lambda p: npz(p / "x.npz", counts=COUNTS[0], layers=np.arange(3)), [([], WINDOW)]),
    "ranks in a column": (lambda p: jsonl(p / "x.jsonl", ranks("ep_rank")), [
        ([], COUNTS), (["--sum-over", "ep_rank"], "not added up"), (["--where", "ep_rank=1"], COUNTS[:, :, 4:8])]),
    "one rank": (lambda p: jsonl(p / "x.jsonl", [row for row in ranks("ep_rank") if row["ep_rank"] == 1]), [
        ([], "part of the experts"), (["--accept", "part"], COUNTS[:, :, 4:8])]),
    "one rank, in a document": (lambda p: document(p / "x.json", {"ep_rank": 1, "ep_size": 4, "counts": COUNTS[..., 4:8].tolist()}), [
        ([], "ep_rank is 1 of ep_size 4"), (["--accept", "part"], COUNTS[:, :, 4:8])]),
    "zeros but for one rank": (lambda p: document(p / "x.json", {"logical_count": np.where(np.arange(16) < 4, COUNTS[0], 0).tolist()}), [
        ([], "one rank of 4")]),
    "replicas in a column": (lambda p: csv(p / "x.csv", pd.DataFrame(TWO, columns=[*long(), "rank"])), [
        ([], "--sum-over rank"), (["--sum-over", "rank"], 2 * COUNTS), (["--where", "rank=1"], COUNTS)]),
    "phases": (lambda p: csv(p / "x.csv", PHASES), [
        ([], "--where phase=decode"), (["--where", "phase=decode"], COUNTS[1::2]), (["--phase", "prefill"], COUNTS[::2]),
        (["--sum-over", "phase"], COUNTS), (["--where", "face=decode"], "check --where")]),
    "phases of choices": (lambda p: jsonl(p / "x.jsonl", [{**row, "phase": "ab"[row["tok"] // 240]} for row in by_token("tok")]), [
        (["--tokens", 240], "--where phase=a"), (["--tokens", 240, "--where", "phase=a"], tally(CHOICES[:240]))]),
    "a constant column": (lambda p: csv(p / "x.csv", long(("model", "m"))), [([], COUNTS)]),
    "the owner of an expert": (lambda p: csv(p / "x.csv", long(("gpu", np.arange(6 * 48) % 16 // 4))), [([], COUNTS)]),
    "shares in percent": (lambda p: csv(p / "x.csv", wide(100 / 4096)), [(["--tokens-per-step", 4096], COUNTS)]),
    "shares": (lambda p: csv(p / "x.csv", wide(1 / 4096)), [(["--tokens-per-step", 4096], COUNTS)]),
    "long shares in percent": (lambda p: csv(p / "x.csv", long().rename(columns={"tokens": "share"}).assign(share=COUNTS.ravel() / 40.96)), [
        (["--tokens-per-step", 4096], COUNTS)]),
    "highest and lowest alone": (lambda p: csv(p / "x.csv", wide(16 / 4096, "utilization/layer_{}_expert_{}").mask(lambda f: (f > 0.3) & (f < 1.5) & (f.columns != "Step"))), [
        (["--tokens-per-step", 4096, "--experts", 16], "not in the log"),
        (["--tokens-per-step", 4096, "--experts", 16, "--idle-experts", "--accept", "tokens-differ"], "not in the log")]),
    "labels, a clock": (lambda p: csv(p / "x.csv", wide(1, '{{expert="{1}", layer="{0}"}}').astype(int).rename(columns={"Step": "Time"}).assign(Time=pd.date_range("2026-05-01", periods=6, freq="15s").astype(str))), [
        ([], COUNTS), (["--pattern", r'expert="(?P<layer>\d+)", layer="(?P<expert>\d+)'], "exchange its groups")]),
    "seconds since 1970": (lambda p: csv(p / "x.csv", long().rename(columns={"step": "time"}).assign(time=1_790_000_000 + 15 * (np.arange(288) // 48))), [([], COUNTS)]),
    "how long it took": (lambda p: csv(p / "x.csv", long().rename(columns={"step": "time"})), [
        ([], "1 is no date"), (["--column", "step=time"], COUNTS)]),
    "other keys": (lambda p: document(p / "x.json", STATS), [
        ([], "--key: layers.expert_counts (3 x 16)"), (["--key", "layers.expert_counts"], WINDOW), (["--key", "layers.nothing"], "--key: layers.expert_counts")]),
    "choices under a key": (lambda p: document(p / "x.json", ATLAS), [
        ([], "layers.topk (3 x 480 x 4)"), (["--key", "layers.topk"], "--from routing"),
        (["--key", "layers.topk", "--from", "routing", "--tokens", 480], ONE)]),
    "a key of .pt": (lambda p: torch_file(p / "x.pt", lambda t: {j: {"freq": t.tensor(COUNTS[0, j]), "total": t.tensor(1)} for j in range(3)}), [
        ([], "--key: freq (3 x 16)"), (["--key", "freq"], WINDOW)]),
    "a key of .npz": (lambda p: npz(p / "x.npz", mine=COUNTS, other=np.ones(3)), [
        ([], "--key: mine (6 x 3 x 16)"), (["--key", "mine"], COUNTS)]),
    "a key of lines": (lambda p: jsonl(p / "x.jsonl", [{"step": s + 1, "a": {"b": COUNTS[s].tolist(), "c": "x"}} for s in range(6)]), [
        ([], "--key: a.b (3 x 16)"), (["--key", "a.b"], COUNTS)]),
    "a log": (lambda p: text(p / "x.log", [f"INFO step {s + 1} layer {j} load: {COUNTS[s, j].tolist()}" for s, j in np.ndindex(6, 3)]), [
        ([], USUAL[0]), (["--pattern", USUAL[0]], COUNTS), (["--pattern", r"step (?P<step>\d+)"], "step, layer, expert and tokens"),
        (["--pattern", "("], "not a regular expression"), (["--pattern", r"(?P<step>INFO).*(?P<tokens>\[.*)"], "x.log, line 1: has")]),
    "a log of another kind": (lambda p: text(p / "x.log", [f"{s}/{j}/{e}={COUNTS[s, j, e]}" for s, j, e in np.ndindex(6, 3, 16)]), [
        ([], "--from log"), (["--from", "log"], "give a --pattern"),
        (["--from", "log", "--pattern", r"^(?P<step>\d+)/(?P<layer>\d+)/(?P<expert>\d+)=(?P<tokens>\d+)"], COUNTS)]),
    "a printed summary": (lambda p: text(p / "x.txt", [line for j in range(3) for line in (f"Layer {j} load:", *(f"  Expert {e}: {COUNTS[0, j, e]} tokens" for e in range(16)))]), [
        ([], USUAL[1]), (["--pattern", USUAL[1]], WINDOW)]),
    "scrapes in a file": (lambda p: text(p / "x.prom", [line for s in range(6) for line in scrape(s)]), [
        ([], "--difference"), (["--difference"], COUNTS), (["--difference", "--key", "other"], "no metric"),
        (["--difference", "--where", "engine=0"], COUNTS // 2)]),
    "a gauge": (lambda p: text(p / "x.prom", [line.replace("counter", "gauge") for line in scrape(0, "load")]), [([], WINDOW)]),
    "two metrics": (lambda p: text(p / "x.prom", [*scrape(0), *scrape(0, "x:more")]), [
        (["--difference"], "--key moe:tokens_total"), (["--difference", "--key", "moe:tokens_total"], WINDOW)]),
    "two models": (lambda p: text(p / "x.prom", [*scrape(0), *scrape(0, model="n")]), [
        (["--difference"], "--where model=m"), (["--difference", "--where", "model=m"], WINDOW)]),
    "exp_0 and no step": (lambda p: csv(p / "x.csv", pd.DataFrame(COUNTS[0], columns=[f"exp_{e}" for e in range(16)]).assign(layer=[f"model.layers.{j}.mlp" for j in range(3)])), [
        ([], WINDOW)]),
    "a header in the middle": (lambda p: text(p / "x.csv", ["layer,expert", *picks(0, 240), "layer,expert", *picks(240, 480)]), [
        (["--tokens", 480, "--top-k", 4], "row 2880: is the header again")]),
    "idle experts that were not": (lambda p: csv(p / "x.csv", long()[long()["expert"] < 12]), [
        (["--idle-experts", "--experts", 16, "--tokens-per-step", 4096, "--accept", "tokens-differ"], "were not idle")]),
    "a request": (lambda p: document(p / "0.json", request(*HALVES)), [
        ([], EACH), (["--phase", "prefill"], EACH[:1]), (["--phase", "decode"], EACH[1:])]),
    "a request without a number": (lambda p: document(p / "0.json", [*request(*HALVES), {"layer": [[1, 2]]}]), [
        ([], "pass 3: is no object with layers")]),
    "a request of other k": (lambda p: document(p / "0.json", [*request(*HALVES), {"1": [[1, 2], [3]]}]), [
        ([], "pass 3, layer 1: holds no choices (tokens, k)")]),
    "a request without a decode pass": (lambda p: document(p / "0.json", request(HALVES[0])), [
        (["--phase", "decode"], "has no decode pass"), (["--phase", "prefill"], EACH[:1])]),
    "a request with a number below -1": (lambda p: document(p / "0.json", request(np.where(CHOICES == 3, -7, CHOICES))), [
        ([], "holds expert -7")]),
    "an array with a number below -1": (lambda p: npy(p / "routed_experts.npy", np.where(CHOICES == 3, -7, CHOICES)), [
        (["--tokens", 480], "holds expert -7")]),
    "a phase of none": (lambda p: npy(p / "routed_experts.npy", CHOICES), [
        (["--phase", "decode", "--tokens", 480], "--phase")]),
    "answers, nested": (lambda p: jsonl(p / "x.jsonl", [{"meta": {"routed_experts": half.tolist()}} for half in HALVES]), [([], EACH)]),
    "answers of vLLM": (lambda p: jsonl(p / "x.jsonl", [{"choices": [{"routed_experts": per_token(half)}]} for half in HALVES]), [([], EACH)]),
    "answers of SGLang": (lambda p: jsonl(p / "x.jsonl", map(sglang, HALVES)), [([], "--top-k K"), (["--top-k", 4], EACH)]),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
@pytest.mark.slow
def test_it_is_read_or_asked(moetrace, tmp_path, case):
    """Never numbers that are no counts, a part for the whole, or one value of several."""
    write, runs = CASES[case]
    path = write(tmp_path)

    for argv, right in runs:
        done = moetrace("ingest", path, *argv, "--force", "--json")

        if isinstance(right, str):
            assert done.code in (1, 2), (argv, done.out)
            assert right in " ".join(done.err.split()), argv
        else:
            assert done.code == 0, (argv, done.err)
            assert np.array_equal(right, open_trace(done.json["traces"][0]["path"]).counts), argv


@pytest.mark.parametrize(("how", "said"), [("sum", "--merge experts"), ("experts", None)])
def test_ranks_that_name_themselves_are_put_side_by_side(moetrace, tmp_path, how, said):
    """And are not added up."""
    folder = tmp_path / "run"
    folder.mkdir()
    for rank in range(4):
        jsonl(folder / f"rank{rank}.jsonl", [row for row in ranks("ep_rank") if row["ep_rank"] == rank])

    done = moetrace("ingest", folder, "--merge", how, "--json")

    if said:
        assert said in done.err
    else:
        assert np.array_equal(COUNTS, open_trace(done.json["traces"][0]["path"]).counts)


def test_scrapes_of_a_folder_follow_each_other(moetrace, tmp_path):
    """In the order of their times."""
    folder = tmp_path / "run"
    folder.mkdir()
    for step in range(6):
        text(folder / f"metrics_{1790000000 + 15 * step}.prom", scrape(step))

    done = moetrace("ingest", folder, "--merge", "steps", "--difference", "--json")

    assert np.array_equal(COUNTS, open_trace(done.json["traces"][0]["path"]).counts)


@pytest.mark.slow
def test_requests_follow_each_other(moetrace, tmp_path):
    """A file each, in the order of their numbers; or side by side, as a batch."""
    folder = tmp_path / "run"
    folder.mkdir()
    for number in range(11):
        document(folder / f"{number}.json", request(*HALVES if number != 10 else HALVES[::-1]))

    done = moetrace("ingest", folder, "--merge", "steps", "--json")
    batch = moetrace("ingest", folder, "--merge", "sum", "--name", "batch", "--json")

    found = open_trace(done.json["traces"][0]["path"])
    assert np.array_equal(np.concatenate([*[EACH] * 10, EACH[::-1]]), found.counts)
    assert [1, 3, 5] == list(found.layers)
    assert np.array_equal(10 * EACH + EACH[::-1], open_trace(batch.json["traces"][0]["path"]).counts)


def test_ranks_with_zeros_for_others_are_added_up(moetrace, tmp_path):
    """Side by side they would be four times as many experts."""
    folder = tmp_path / "run"
    folder.mkdir()
    for rank in range(4):
        own = np.where(np.arange(16) // 4 == rank, COUNTS[0], 0)
        document(folder / f"rank{rank}.json", {"logical_count": own.tolist()})

    beside = moetrace("ingest", folder, "--merge", "experts")
    added = moetrace("ingest", folder, "--merge", "sum", "--json")

    assert "--merge sum" in beside.err
    assert np.array_equal(WINDOW, open_trace(added.json["traces"][0]["path"]).counts)
