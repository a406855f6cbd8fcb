"""Recording plain torch modules, framework-style buffers, and several processes."""

import copy
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils.checkpoint import checkpoint

from moetrace import SettingError, TraceError, open_trace
from moetrace.record import Recorder
from moetrace.record.torch import Watch, count_indices, watch_buffers

EXPERTS = 4


class Router(torch.nn.Module):
    """Chooses two of four experts; keeps a Megatron-style or torchtitan-style buffer."""

    def __init__(self, buffer, *, only_with_gradients, number=None):
        super().__init__()
        self.gate = torch.nn.Linear(8, EXPERTS, bias=False)
        self.buffer, self.only_with_gradients = buffer, only_with_gradients
        self.register_buffer(buffer, torch.zeros(EXPERTS), persistent=False)
        if number is not None:
            self.layer_number = number

    def forward(self, x):
        """Scaled tokens (tokens, 8), and the map of choices (tokens, experts)."""
        probs = self.gate(x).softmax(-1)
        top = probs.topk(2)
        chosen = torch.zeros_like(probs).scatter(1, top.indices, 1).bool()
        if torch.is_grad_enabled() or not self.only_with_gradients:
            with torch.no_grad():
                getattr(self, self.buffer).add_(chosen.sum(0))
        return x * top.values.sum(-1, keepdim=True), chosen


class Model(torch.nn.Module):
    """Two routers in layers 0 and 1, or numbered by the framework; activations recomputed on demand."""

    def __init__(self, buffer="tokens_per_expert", *, only_with_gradients=False, numbers=(None, None)):
        super().__init__()
        torch.manual_seed(0)
        self.layers = torch.nn.ModuleList(
            Router(buffer, only_with_gradients=only_with_gradients, number=number) for number in numbers
        )

    def forward(self, x, recompute=None):
        """The output, and the maps of choices of both layers."""
        maps = []
        for layer in self.layers:
            if recompute is None:
                x, chosen = layer(x)
            else:
                x, chosen = checkpoint(layer, x, use_reentrant=recompute == "reentrant")
            maps.append(chosen)
        return x, maps


def tokens(seed):
    """Twenty random tokens (20, 8)."""
    return torch.randn(20, 8, generator=torch.Generator().manual_seed(seed), requires_grad=True)


def counted(maps):
    """Counts (layers, experts) of the maps of one pass."""
    return np.stack([chosen.sum(0).numpy() for chosen in maps])


@pytest.mark.parametrize("recompute", [None, "plain", "reentrant"])
@pytest.mark.parametrize(
    ("buffer", "settings", "layers"),
    [
        ("tokens_per_expert", {}, (0, 1)),
        ("local_tokens_per_expert", {"only_with_gradients": True, "numbers": (3, 7)}, (3, 7)),
        ("global_tokens_per_expert", {"only_with_gradients": True, "numbers": (3, 7)}, (3, 7)),
    ],
)
def test_buffers_count_once_whatever_the_framework_does(tmp_path, recompute, buffer, settings, layers):
    """Two micro-batches a step, recomputed or not, the buffer set back at the end of a step or never."""
    model = Model(buffer, **settings)
    expected = []
    with Recorder(tmp_path / "run.parquet") as recorder, watch_buffers(model, recorder) as watching:
        for step in range(3):
            parts = []
            for micro in range(2):
                output, maps = model(tokens(10 * step + micro), recompute)
                output.sum().backward()
                parts.append(counted(maps))
            expected.append(sum(parts))
            with torch.no_grad():
                model(tokens(99))
            if step == 0:
                for layer in model.layers:
                    getattr(layer, buffer).zero_()
            watching.step()
    trace = open_trace(tmp_path / "run.parquet")

    assert layers == trace.layers
    assert np.array_equal(np.stack(expected), trace.counts)


@pytest.mark.parametrize("recompute", [None, "plain", "reentrant"])
def test_outputs_are_counted(tmp_path, recompute):
    """A hook on a map of choices, on indices, and on counts: all the same."""
    model = Model()
    with Recorder(tmp_path / "run.parquet") as recorder, Watch(recorder) as watching:
        router = model.layers[0]
        watching.chosen(router, 0, lambda _module, _args, _kwargs, output: output[1])
        watching.indices(router, 1, EXPERTS, lambda _module, _args, _kwargs, output: output[1].nonzero()[:, 1])
        watching.counts(router, 2, lambda _module, _args, _kwargs, output: output[1].sum(0))
        output, maps = model(tokens(0), recompute)
        output.sum().backward()
        watching.step(40)
    trace = open_trace(tmp_path / "run.parquet")

    assert [40] == trace.steps.tolist()
    assert np.array_equal(np.stack([counted(maps)[0]] * 3), trace.counts[0])


def test_indices_are_counted_with_weights():
    """A choice of weight 0 does not count."""
    counts = count_indices(torch.tensor([[0, 1], [1, 3]]), 5, torch.tensor([[1, 1], [0, 1]]))

    assert [1, 1, 0, 1, 0] == counts.tolist()


def test_a_buffer_beyond_float32_is_refused(tmp_path):
    """Counts that float32 no longer tells apart are not recorded."""
    model = Model()
    model.layers[0].tokens_per_expert.fill_(2.0**24)
    watching = watch_buffers(model, Recorder(tmp_path / "run.parquet"))
    model(tokens(0))

    with pytest.raises(TraceError, match="16,777,216"):
        watching.step()


@pytest.mark.parametrize("layer", [-1, "0", 2**31, None])
def test_a_layer_that_is_none_is_refused(layer):
    """Where it is given, before a step is lost to it."""
    for watch_layer in (Watch(None).counts, Watch(None).chosen):
        with pytest.raises(TraceError, match="is invalid; give an integer from 0"):
            watch_layer(Router("counts", only_with_gradients=False), layer, lambda *_passed: None)


def test_notes_may_be_tensors(tmp_path):
    """Numbers and lists in the metadata, whatever their type and device; a tensor without data is refused."""
    with Recorder(tmp_path / "run.parquet", notes={"loss": torch.tensor(0.5, requires_grad=True)}) as recorder:
        recorder.note(curve=torch.tensor([1.5, float("nan")], dtype=torch.bfloat16))
        with pytest.raises(SettingError, match="note 'lost' cannot be stored"):
            recorder.note(lost=torch.empty(2, device="meta"))
        recorder.add(torch.tensor(3), torch.tensor([1, 2]))
        recorder.step(torch.tensor(7))
    trace = open_trace(tmp_path / "run.parquet")

    assert {"loss": 0.5, "curve": [1.5, None]} == trace.info.notes
    assert ((3,), [7]) == (trace.layers, trace.steps.tolist())


def test_two_modules_of_one_layer_are_refused():
    """Their counts would be added up; the error names both."""
    with pytest.raises(TraceError, match=r"layers.1: is layer 3, as is layers.0"):
        watch_buffers(Model(numbers=(3, 3)), None)


def test_a_model_without_buffers_is_told():
    """The error names the buffers that are known, and what to do."""
    with pytest.raises(TraceError, match=r"local_tokens_per_expert.*by hand"):
        watch_buffers(torch.nn.Linear(2, 2), None)


@pytest.mark.parametrize("buffer", ["tokens_per_expert", "local_tokens_per_expert"])
def test_each_micro_batch_may_recompute_in_its_own_way(tmp_path, buffer):
    """A plain one followed by a reentrant one, and the other way round: both count, once."""
    model = Model(buffer, only_with_gradients=buffer.startswith("local"))
    with Recorder(tmp_path / "run.parquet") as recorder:
        by_buffer = watch_buffers(model, recorder)
        by_hand = Watch(None)
        for number, layer in enumerate(model.layers):
            by_hand.chosen(layer, number, lambda _module, _args, _kwargs, output: output[1])
        for ways in ((None, "reentrant"), ("reentrant", None), ("plain", "reentrant", "plain")):
            expected = 0
            for micro, way in enumerate(ways):
                output, maps = model(tokens(micro), way)
                output.sum().backward()
                expected += counted(maps)
            for watching in (by_buffer, by_hand):
                assert np.array_equal(expected, np.stack([watching._counts[layer] for layer in (0, 1)])), ways
                watching.step()


class Failing(torch.nn.Module):
    """A model of which a pass fails between its layers, where it is told to."""

    def __init__(self):
        super().__init__()
        self.inner, self.fails = Model(), False
        self.inner.layers[1].register_forward_pre_hook(self._fail)

    def _fail(self, _module, _args):
        if self.fails:
            raise MemoryError

    def forward(self, x, recompute=None):
        """As the model within."""
        return self.inner(x, recompute)


@pytest.mark.parametrize("part", ["whole", "inner"])
@pytest.mark.parametrize("recompute", [None, "plain"])
def test_a_pass_that_fails_and_is_retried_counts_once(recompute, part):
    """Whether the model is called or a part of it; other exceptions than errors leave nothing either."""
    model = Failing()
    called = model if part == "whole" else model.inner
    watching = watch_buffers(model, None)
    output, first = called(tokens(0), recompute)
    output.sum().backward()
    model.fails = True
    for _ in range(2):
        with pytest.raises(MemoryError):
            called(tokens(1), recompute)
    model.fails = False
    output, second = called(tokens(1), recompute)
    output.sum().backward()

    assert np.array_equal(counted(first) + counted(second), np.stack([watching._counts[layer] for layer in (0, 1)]))


def test_a_copy_of_a_watched_model_is_not_watched(tmp_path):
    """Deep copies and files of the whole model count nothing, as when a moving average of the weights is kept."""
    model = Model()
    watching = watch_buffers(model, None)
    torch.save(model, tmp_path / "model.pt")
    copies = [copy.deepcopy(model), torch.load(tmp_path / "model.pt", weights_only=False)]
    _, maps = model(tokens(0))
    for other in copies:
        other(tokens(1))

    assert np.array_equal(counted(maps), np.stack([watching._counts[layer] for layer in (0, 1)]))


RANKS = """
import sys
import torch
import torch.distributed as dist
from moetrace.record import Recorder
from moetrace.record.distributed import rank_path, shared_recorder
from moetrace.record.torch import Watch, watch_buffers
sys.path.insert(0, sys.argv[4])
from test_record_torch import Model, tokens

path, store, rank = sys.argv[1], sys.argv[2], int(sys.argv[3])
dist.init_process_group("gloo", init_method="file://" + store, rank=rank, world_size=2)
model = Model()
with shared_recorder(path, block=2) as recorder, Recorder(rank_path(path)) as own:
    watching = watch_buffers(model, recorder)
    alone = dist.new_group([0]), dist.new_group([1])
    by_hand = Watch(own, group=alone[rank])
    for number, layer in enumerate(model.layers):
        by_hand.chosen(layer, number, lambda module, args, kwargs, output: output[1])
    for step in range(5):
        model(tokens(2 * step + rank))[0].sum().backward()
        watching.step()
        by_hand.step()
dist.destroy_process_group()
"""


def test_two_processes_are_summed(tmp_path):
    """Rank 0 records the sum of both; each rank's own file holds its part."""
    path = tmp_path / "run.parquet"
    children = [
        subprocess.Popen([sys.executable, "-c", RANKS, path, tmp_path / "store", str(rank), str(Path(__file__).parent)])
        for rank in (0, 1)
    ]
    assert [0, 0] == [child.wait(timeout=120) for child in children]
    model = Model()
    parts = [np.stack([counted(model(tokens(2 * step + rank))[1]) for step in range(5)]) for rank in (0, 1)]

    assert np.array_equal(parts[0] + parts[1], open_trace(path).counts)
    for rank in (0, 1):
        assert np.array_equal(parts[rank], open_trace(tmp_path / f"run.rank{rank}.parquet").counts)
