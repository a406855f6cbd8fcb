"""Dumps of a trace as their programs write them: one function per format, made with the real library."""

import io
import json
import pickle
import zipfile
from csv import writer
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import long_table

from moetrace import LoadTrace, ReadOptions, Recorder
from moetrace.formats.readers.text import USUAL


def parquet(trace: LoadTrace, folder: Path) -> Path:
    """One row per step, layer and expert, by pyarrow."""
    pq.write_table(long_table(trace), folder / "dump.parquet")
    return folder / "dump.parquet"


def csv(trace: LoadTrace, folder: Path) -> Path:
    """The same by pandas."""
    long_table(trace).to_pandas().to_csv(folder / "dump.csv", index=False)
    return folder / "dump.csv"


def jsonl(trace: LoadTrace, folder: Path) -> Path:
    """The counts of a layer in a list, by pandas."""
    rows = [
        {"step": int(step), "layer": layer, "counts": load.counts[i].tolist()}
        for i, step in enumerate(trace.steps)
        for layer, load in zip(trace.layers, trace.by_layer())
    ]
    pd.DataFrame(rows).to_json(folder / "dump.jsonl", orient="records", lines=True)
    return folder / "dump.jsonl"


def numpy(trace: LoadTrace, folder: Path) -> Path:
    """An .npz with counts, steps and layers."""
    np.savez(folder / "dump.npz", counts=trace.counts, steps=trace.steps, layers=trace.layers)
    return folder / "dump.npz"


def megatron(trace: LoadTrace, folder: Path) -> Path:
    """Two expert-parallel ranks, two micro-batches, as `ActivationLogger.save_tpe` writes them."""
    inside = folder / "save" / "tokens_per_expert"
    inside.mkdir(parents=True)
    half = trace.experts // 2
    for rank, experts in enumerate((slice(0, half), slice(half, 2 * half))):
        lines = []
        for i, step in enumerate(trace.steps.tolist()):
            for j, layer in enumerate(trace.layers):
                tokens = trace.counts[i, j, experts]
                batches = [(tokens // 3).tolist(), (tokens - tokens // 3).tolist()]
                lines.append({"iter": step, "block": "decoder", "layer": layer, "tpe": batches})
            lines.append({"iter": step, "block": "mtp", "mtp_idx": 0, "layer": 0, "tpe": [[1] * half]})
        (inside / f"rank{rank}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder / "save"


def chosen(counts: np.ndarray, seed: int = 0) -> list[list[int]]:
    """Tokens that each choose one expert, shuffled, so that these are their counts."""
    experts = np.repeat(np.arange(len(counts)), counts)
    return np.random.default_rng(seed).permutation(experts)[:, None].tolist()


def megatron_router(trace: LoadTrace, folder: Path) -> Path:
    """Two ranks with half of the tokens each, one micro-batch each, as `RouterTracer` writes them."""
    inside = folder / "routing"
    inside.mkdir()
    for rank in range(2):
        lines = []
        for i, step in enumerate(trace.steps.tolist()):
            for j, layer in enumerate(trace.layers):
                top = chosen(trace.counts[i, j], i)[rank::2]
                line = {"step": step, "stage": "pre_dispatch", "block": "decoder", "layer": layer, "rank": rank}
                lines.append({**line, "num_tokens": len(top), "topk": 1, "top_indices": top})
        (inside / f"router_trace_rank{rank}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return inside


def routing(trace: LoadTrace, folder: Path) -> Path:
    """A folder for each step, a Parquet file for each layer, a row for each token, as FLAME-MoE has it."""
    for i, step in enumerate(trace.steps.tolist()):
        inside = folder / "model" / "actives" / f"iter_{step}"
        inside.mkdir(parents=True)
        for j, layer in enumerate(trace.layers):
            top = chosen(trace.counts[i, j], i)
            table = {"indices": pa.array(top, pa.list_(pa.int16(), 1)), "scores": pa.array([[1.0]] * len(top))}
            pq.write_table(pa.table(table), inside / f"layer_{layer:02d}.parquet")
    return folder / "model"


def sglang(trace: LoadTrace, folder: Path) -> Path:
    """A `stat` dump with dense layers between and an end of the buffer that was not reached."""
    counts = np.zeros((len(trace.steps), max(trace.layers) + 1, trace.experts), np.int32)
    counts[:, list(trace.layers)] = trace.counts
    document = {"rank": 0, "logical_count": counts, "average_utilization_rate_over_window": None}
    return torch_archive(folder / "expert_distribution_recorder_1700000000.25.pt", document)


def tensorrt(trace: LoadTrace, folder: Path) -> Path:
    """Two ranks with half of the tokens each, by safetensors."""
    from safetensors.numpy import save_file

    inside = folder / "statistic"
    inside.mkdir()
    (inside / "meta_info.json").write_text(json.dumps({"num_experts": trace.experts, "num_experts_per_token": 1}))
    for rank, counts in enumerate((trace.counts // 2, trace.counts - trace.counts // 2)):
        tensors = {
            f"{step}_{layer}": counts[i, j]
            for i, step in enumerate(trace.steps)
            for j, layer in enumerate(trace.layers)
        }
        save_file(tensors, inside / f"rank{rank}.safetensors")
    return inside


def scalars(folder: Path, rows: list[tuple[int, dict[str, float]]]) -> Path:
    """An event file with the scalars of each step, by tensorboard."""
    from tensorboard.compat.proto.event_pb2 import Event
    from tensorboard.compat.proto.summary_pb2 import Summary
    from tensorboard.summary.writer.event_file_writer import EventFileWriter

    writer = EventFileWriter(str(folder))
    for step, tags in rows:
        values = [Summary.Value(tag=tag, simple_value=value) for tag, value in tags.items()]
        writer.add_event(Event(step=step, summary=Summary(value=values)))
    writer.close()
    return folder


def tensorboard(trace: LoadTrace, folder: Path) -> Path:
    """One scalar for each layer and expert, with a loss among them."""
    rows = [
        (
            int(step),
            {
                "loss": 0.5,
                **{
                    f"moe/layer_{layer}/expert_{expert}": float(trace.counts[i, j, expert])
                    for j, layer in enumerate(trace.layers)
                    for expert in range(trace.experts)
                },
            },
        )
        for i, step in enumerate(trace.steps)
    ]
    return scalars(folder / "runs", rows)


def omni(trace: LoadTrace, folder: Path) -> Path:
    """A matrix of layers by experts for each step, as the placement pipeline writes it."""
    inside = folder / "counts"
    inside.mkdir()
    for i, step in enumerate(trace.steps.tolist()):
        columns = [f"ep_{expert}" for expert in range(trace.experts)]
        frame = pd.DataFrame(trace.counts[i], index=[f"layer_{n}" for n in trace.layers], columns=columns)
        frame.to_csv(inside / f"topk_ids_count_20250527_093605_decode_step{step}to{step}.csv")
    return inside


def mindie(trace: LoadTrace, folder: Path) -> Path:
    """Counters of two NPUs after every eighth pass, as `save_eplb_data` appends them, and the copies it keeps."""
    inside = folder / "hotspots" / "decode"
    inside.mkdir(parents=True)
    config = {"num_moe_layers": len(trace.layers), "collection_Interval": 8, "num_of_experts": trace.experts,
              "num_of_selected_experts": [2]}  # fmt: skip
    (inside / "model_gen_config.json").write_text(json.dumps(config, indent=4))
    counters = trace.counts.cumsum(axis=0)  # (steps, layers, experts)
    for rank, experts in enumerate(np.array_split(np.arange(trace.experts), 2)):
        rows = counters[:, :, experts].reshape(-1, len(experts))
        for name in (f"decode_{rank}.csv", f"decode_{rank}_bak.csv"):
            with (inside / name).open("a", encoding="utf-8", newline="") as file:
                writer(file).writerows(rows.tolist())
    return folder / "hotspots"


def prometheus(trace: LoadTrace, folder: Path) -> Path:
    """Counters of each layer and expert, scraped after every step, one scrape after the other."""
    with (folder / "dump.prom").open("w") as file:
        for total in trace.counts.cumsum(axis=0):
            file.write("# TYPE moe_tokens_total counter\nup 1\n")
            for (j, e), n in np.ndenumerate(total):
                file.write(f'moe_tokens_total{{engine="0",layer="{trace.layers[j]}",expert="{e}"}} {n}.0\n')
    return folder / "dump.prom"


def log(trace: LoadTrace, folder: Path) -> Path:
    """What a training loop prints, a line for each layer, with others between."""
    lines = [f"INFO step {step} layer {n} load: {c}\nINFO loss 2.3\n" for step, n, c in by_layer(trace)]
    (folder / "dump.log").write_text("".join(lines))
    return folder / "dump.log"


def parts(trace: LoadTrace, folder: Path) -> Path:
    """Blocks of a recorder that has not been closed."""
    recorder = Recorder(folder / "run.parquet", block=25)
    for i, step in enumerate(trace.steps.tolist()):
        for j, layer in enumerate(trace.layers):
            recorder.add(layer, trace.counts[i, j])
        recorder.step(step)
    recorder.flush()
    return folder / "run.parts"


def torch_dict(trace: LoadTrace, folder: Path) -> Path:
    """A dict of tensors, by torch."""
    torch = pytest.importorskip("torch")
    tensors = {"counts": trace.counts, "steps": trace.steps, "layers": np.array(trace.layers)}
    torch.save({name: torch.from_numpy(values.copy()) for name, values in tensors.items()}, folder / "dump.pt")
    return folder / "dump.pt"


def json_table(trace: LoadTrace, folder: Path) -> Path:
    """Columns and data in one document, by pandas, as a W&B table has them."""
    long_table(trace).to_pandas().to_json(folder / "dump.json", orient="split")
    return folder / "dump.json"


# Formats by their names in the registry.
DUMPS = {
    "parts": parts,
    "parquet": parquet,
    "csv": csv,
    "json": json_table,
    "torch": torch_dict,
    "jsonl": jsonl,
    "numpy": numpy,
    "megatron": megatron,
    "megatron-router": megatron_router,
    "routing": routing,
    "sglang": sglang,
    "tensorrt-llm": tensorrt,
    "tensorboard": tensorboard,
    "omni-infer": omni,
    "mindie": mindie,
    "prometheus": prometheus,
    "log": log,
}
# What a user has to say for a dump that does not tell.
OPTIONS: dict[str, ReadOptions] = {
    "prometheus": ReadOptions(difference=True),
    "log": ReadOptions(settings={"pattern": USUAL[0]}),
}


def by_layer(trace: LoadTrace) -> list[tuple[int, int, list[int]]]:
    """Step, layer and counts of each."""
    return [
        (step, layer, trace.counts[i, j].tolist())
        for i, step in enumerate(trace.steps.tolist())
        for j, layer in enumerate(trace.layers)
    ]


def json_keys(trace: LoadTrace, folder: Path) -> Path:
    """Steps, layers and experts as keys of one document."""
    document: dict[str, dict[str, dict[int, int]]] = {}
    for step, layer, counts in by_layer(trace):
        document.setdefault(f"step_{step}", {})[f"layer_{layer}"] = dict(enumerate(counts))
    (folder / "dump.json").write_text(json.dumps(document))
    return folder / "dump.json"


def jsonl_keys(trace: LoadTrace, folder: Path) -> Path:
    """Experts as keys in each line."""
    lines = [json.dumps({"step": s, "layer": n, "counts": dict(enumerate(c))}) for s, n, c in by_layer(trace)]
    (folder / "dump.jsonl").write_text("".join(line + "\n" for line in lines))
    return folder / "dump.jsonl"


def csv_lists(trace: LoadTrace, folder: Path) -> Path:
    """Lists of counts as text."""
    rows = [{"step": s, "layer": f"model.layers.{n}.mlp", "counts": str(c)} for s, n, c in by_layer(trace)]
    pd.DataFrame(rows).to_csv(folder / "dump.csv", index=False)
    return folder / "dump.csv"


def csv_tags(trace: LoadTrace, folder: Path) -> Path:
    """A column for each layer and expert, rows of a loss between."""
    rows = [
        {"step": s, **row}
        for i, s in enumerate(trace.steps.tolist())
        for row in (
            {"loss": 0.5},
            {
                f"moe/layer_{n}/expert_{e}": trace.counts[i, j, e]
                for j, n in enumerate(trace.layers)
                for e in range(trace.experts)
            },
        )
    ]
    pd.DataFrame(rows).to_csv(folder / "dump.csv", index=False)
    return folder / "dump.csv"


def routing_csv(trace: LoadTrace, folder: Path) -> Path:
    """A row for each token, its choices as text."""
    rows = [
        {"step": s, "token": i, "layer": n, "topk_ids": str(top)}
        for s, n, c in by_layer(trace)
        for i, top in enumerate(chosen(np.array(c), s))
    ]
    pd.DataFrame(rows).to_csv(folder / "dump.csv", index=False)
    return folder / "dump.csv"


def npz_layers(trace: LoadTrace, folder: Path) -> Path:
    """An array for each layer."""
    np.savez(folder / "dump.npz", **{f"layer_{n}": trace.counts[:, j] for j, n in enumerate(trace.layers)})
    return folder / "dump.npz"


# More forms that some formats have, for damage: the format and what is different.
FORMS = {
    "json+keys": json_keys,
    "jsonl+keys": jsonl_keys,
    "csv+lists": csv_lists,
    "csv+tags": csv_tags,
    "routing+csv": routing_csv,
    "numpy+layers": npz_layers,
}


PICKLER: Any = vars(pickle)["_Pickler"]  # the one in Python, whose methods can be replaced


def torch_archive(path, document):
    """*document*, whose arrays are tensors, as `torch.save` writes it; torch is not needed, and left alone if there."""
    storages, names = [], {np.dtype("i8"): "LongStorage", np.dtype("i4"): "IntStorage", np.dtype("f4"): "FloatStorage"}

    class Saver(PICKLER):
        def save(self, value, save_persistent_id=True):
            if not isinstance(value, np.ndarray):
                super().save(value, save_persistent_id)
                return
            stride = [n // value.itemsize for n in np.ascontiguousarray(value).strides]
            self.write(b"ctorch._utils\n_rebuild_tensor_v2\n((")
            super().save("storage")
            self.write(f"ctorch\n{names[value.dtype]}\n".encode())
            for part in (str(len(storages)), "cpu", value.size):
                super().save(part)
            self.write(b"tQ")
            for part in (0, value.shape, tuple(stride), False, None):
                super().save(part)
            self.write(b"tR")
            storages.append(value.tobytes())

    pickled = io.BytesIO()
    Saver(pickled, 2).dump(document)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", pickled.getvalue())
        for key, data in enumerate(storages):
            archive.writestr(f"archive/data/{key}", data)
    return path
