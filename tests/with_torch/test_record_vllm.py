"""The counting of vLLM's plug-in, on imitations of its router's buffer, its batches and its workers."""

import sys
import threading
import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from moetrace import SettingError, TraceError, open_trace
from moetrace.record import read_parts
from moetrace.record import vllm as plugin
from moetrace.record.vllm import Counter, Recording, Settings, batch_of

LAYERS, EXPERTS, TOP_K, MODEL_LAYERS = [1, 3, 4], 6, 2, 5


def choices(seed, tokens=40):
    """Random experts of each token in each layer of the model, (tokens, layers, top_k), as vLLM stores them."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, EXPERTS, (tokens, MODEL_LAYERS, TOP_K), generator=generator, dtype=torch.int32)


def counted(chosen, rows):
    """The plain loop: how often each expert is chosen by the tokens *rows*, (layers, experts)."""
    return np.stack([np.bincount(chosen[rows, layer].ravel(), minlength=EXPERTS) for layer in LAYERS])


class Worker:
    """A model runner and its worker: each pass fills the buffer with the choices of its tokens, and of padding."""

    def __init__(self):
        self.buffer = torch.zeros((64, MODEL_LAYERS, TOP_K), dtype=torch.int32)
        self.model_runner = self
        self.input_batch = None
        self.dummies = 0

    def execute_model(self, scheduled, **_settings):
        """As vLLM's: what it gives back is not the plug-in's business."""
        self.buffer[:40] = choices(scheduled.seed)
        prompts, done = zip(*scheduled.requests.values()) if scheduled.requests else ((), ())
        self.input_batch = SimpleNamespace(
            req_ids=list(scheduled.requests),
            num_prompt_tokens=np.array(prompts),
            num_computed_tokens_cpu=np.array(done),
        )
        return "output"

    def execute_dummy_batch(self):
        """Keeps other ranks company."""
        self.dummies += 1


def scheduled(seed, **requests):
    """A pass by requests: the tokens that each has in it, its prompt, and what was computed of it before."""
    tokens = {name: own for name, (own, _, _) in requests.items()}
    order = dict(reversed([(name, (prompt, done)) for name, (_, prompt, done) in requests.items()]))
    return SimpleNamespace(
        seed=seed, requests=order, num_scheduled_tokens=tokens, total_num_scheduled_tokens=sum(tokens.values())
    )


def until(true):
    """Wait for what the thread that writes does."""
    for _ in range(2000):
        if true():
            return
        time.sleep(0.005)
    raise AssertionError


MIXED = {"a": (9, 20, 0), "b": (1, 7, 7), "c": (1, 5, 8)}  # a is prefill, and comes last in the batch
DECODE = {"b": (1, 7, 8), "c": (1, 5, 9)}


@pytest.fixture
def recording(tmp_path):
    """Makes recordings into one path, each with a worker of its own; all are closed."""
    made = []

    def make(**settings):
        worker = Worker()
        counter = Counter(worker.buffer, LAYERS, EXPERTS)
        path = tmp_path / "run.parquet"
        made.append(Recording(counter, LAYERS, Settings(path, **settings), path, model="tiny", top_k=TOP_K))
        made[-1].follow(worker)
        return made[-1], worker

    yield make
    for one in made:
        one.close()


@pytest.mark.parametrize("chunk", [1, 1 << 20])
def test_counts_are_those_of_the_tokens_of_the_pass(monkeypatch, chunk):
    """By layer and phase; not of padding behind them, nor of experts that do not exist."""
    monkeypatch.setattr(plugin, "CHUNK", chunk)
    chosen = choices(0)
    chosen[2, 3, 0], chosen[3, 1, 1] = -1, EXPERTS
    decoding = np.arange(30) % 3 == 0
    counter = Counter(chosen, LAYERS, EXPERTS)
    counter.count(30, ~decoding, 0)
    counter.count(30, decoding, 1)
    expected = np.zeros((2, len(LAYERS), EXPERTS), int)
    for token, layer, choice in np.ndindex(30, len(LAYERS), TOP_K):
        expert = int(chosen[token, LAYERS[layer], choice])
        if 0 <= expert < EXPERTS:
            expected[int(decoding[token]), layer, expert] += 1

    assert np.array_equal(expected, counter.take(1))
    assert np.array_equal(expected[::-1], counter.take(0))


def test_decode_tokens_are_told_in_the_order_of_the_batch():
    """Of both model runners: rows of a request stand together, in the order of the batch and not of the scheduler."""
    worker = Worker()
    one = scheduled(0, **MIXED)
    worker.execute_model(one)
    later = SimpleNamespace(
        num_scheduled_tokens=np.array([1, 1, 9]), is_prefilling_np=np.array([False, False, True]), num_tokens=10
    )

    assert (11, [True] * 2 + [False] * 9) == (batch_of(worker, one)[0], batch_of(worker, one)[1].tolist())
    v2 = SimpleNamespace(execute_model_state=SimpleNamespace(input_batch=later))
    assert (10, [True] * 2 + [False] * 8) == (batch_of(v2, None)[0], batch_of(v2, None)[1].tolist())


def test_passes_are_steps(recording, tmp_path):
    """Passes without tokens and dummy runs are none; a dummy batch beside another rank's pass takes a number."""
    own, worker = recording()
    assert "output" == worker.execute_model(scheduled(1, **MIXED))
    worker.execute_model(scheduled(7))
    worker.execute_model(scheduled(8, **MIXED), dummy_run=True)
    worker.execute_dummy_batch()
    worker.execute_model(scheduled(2, a=(9, 20, 9)))
    worker.execute_model(scheduled(3, **DECODE))
    own.close()
    trace, decode = open_trace(tmp_path / "run.parquet"), open_trace(tmp_path / "run-decode.parquet")

    assert ([1, 3, 4], [1, 4], 1) == (trace.steps.tolist(), decode.steps.tolist(), worker.dummies)
    assert np.array_equal(
        [counted(choices(1), range(11)), counted(choices(2), range(9)), counted(choices(3), range(2))], trace.counts
    )
    assert np.array_equal([counted(choices(1), range(2)), counted(choices(3), range(2))], decode.counts)
    assert (tuple(LAYERS), "tiny", TOP_K) == (trace.layers, trace.info.model, trace.info.top_k)


def test_every_third_pass_is_recorded_by_its_number(recording, tmp_path):
    """The others are counted as steps."""
    own, worker = recording(every=3)
    for seed in range(1, 8):
        worker.execute_model(scheduled(seed, **DECODE))
    own.close()
    trace = open_trace(tmp_path / "run.parquet")

    assert [3, 6] == trace.steps.tolist()
    assert np.array_equal([counted(choices(seed), range(2)) for seed in (3, 6)], trace.counts)


def test_a_file_pauses(recording, tmp_path, monkeypatch):
    """What was recorded before is written then; passes go on being counted."""
    own, worker = recording()
    worker.execute_model(scheduled(1, **DECODE))
    (tmp_path / "run.pause").touch()
    until(lambda: own._paused)
    worker.execute_model(scheduled(2, **DECODE))
    until(lambda: list((tmp_path / "run.parts").glob("part-*")))
    (tmp_path / "run.pause").unlink()
    until(lambda: not own._paused)
    worker.execute_model(scheduled(3, **DECODE))
    own.close()

    assert [1, 3] == open_trace(tmp_path / "run.parquet").steps.tolist()


def test_a_size_limit_ends_the_recording(recording, tmp_path, monkeypatch):
    """After the block that goes beyond it; the server goes on."""
    monkeypatch.setattr(plugin, "BLOCK_BYTES", 2 * 2 * len(LAYERS) * EXPERTS * 8)
    own, worker = recording(megabytes=0)
    for seed in range(2):
        worker.execute_model(scheduled(seed, **DECODE))
    until(lambda: own._ended)
    assert "output" == worker.execute_model(scheduled(9, **DECODE))
    own.close()

    assert [1, 2] == open_trace(tmp_path / "run.parquet").steps.tolist()


@pytest.mark.parametrize("where", ["in the pass", "in the thread"])
def test_an_error_ends_the_recording_and_not_the_server(recording, tmp_path, monkeypatch, caplog, where):
    """It is in the log, once, and what was recorded before is kept."""
    own, worker = recording()
    worker.execute_model(scheduled(1, **DECODE))
    until(lambda: own._free.qsize() == plugin.WAITING)

    def fail(*passed):
        raise MemoryError

    monkeypatch.setattr(own._counter, "count" if where == "in the pass" else "take", fail)
    for seed in (2, 3):
        assert "output" == worker.execute_model(scheduled(seed, **DECODE))
    own.close()

    assert 1 == caplog.text.count("recording has ended after an error")
    assert [1] == open_trace(tmp_path / "run.parquet").steps.tolist()


def test_a_disk_that_does_not_answer_costs_passes_and_not_the_server(recording, tmp_path, monkeypatch, caplog):
    """Passes that find no room are left out, with one line in the log; afterwards it goes on."""
    monkeypatch.setattr(plugin, "WAITING", 2)
    monkeypatch.setattr(plugin, "PATIENCE", 0.01)
    own, worker = recording()
    answered, take = threading.Event(), own._counter.take
    monkeypatch.setattr(own._counter, "take", lambda slot: answered.wait() and take(slot))
    for seed in range(1, 6):
        worker.execute_model(scheduled(seed, **DECODE))
    answered.set()
    until(lambda: own._free.qsize() == 2)
    worker.execute_model(scheduled(6, **DECODE))
    own.close()

    assert [1, 2, 6] == open_trace(tmp_path / "run.parquet").steps.tolist()
    assert 1 == caplog.text.count("passes from 3 on are not recorded")


def test_a_recording_goes_on_where_it_ended(recording, tmp_path):
    """Closed, or left as parts when the process ends; decode tokens of passes that the other lacks are given up."""
    own, worker = recording()
    worker.execute_model(scheduled(1, **MIXED))
    own.close(whole=False)
    assert [1] == read_parts(tmp_path / "run.parts").steps.tolist()
    ahead, worker = recording()
    ahead._decode.add(1, [1] * EXPERTS)
    ahead._decode.add(3, [1] * EXPERTS)
    ahead._decode.add(4, [1] * EXPERTS)
    ahead._decode.step(2)
    ahead.close(whole=False)
    again, worker = recording()
    worker.execute_model(scheduled(2, **DECODE))
    again.close()
    trace, decode = open_trace(tmp_path / "run.parquet"), open_trace(tmp_path / "run-decode.parquet")

    assert ([1, 2], [1, 2]) == (trace.steps.tolist(), decode.steps.tolist())
    assert np.array_equal(trace.counts[1], decode.counts[1])


def test_nothing_recorded_leaves_nothing(recording, tmp_path):
    """No trace, no parts, no error."""
    own, _ = recording()
    own.close()
    own.close()

    assert [] == list(tmp_path.iterdir())


@pytest.mark.parametrize(("name", "text"), [("EVERY", "0"), ("EVERY", "-3"), ("MB", "many"), ("MB", "")])
def test_a_setting_that_is_none_is_refused(monkeypatch, name, text):
    """By the name of its variable."""
    monkeypatch.setenv("MOETRACE_RECORD", "run.parquet")
    monkeypatch.setenv(f"MOETRACE_RECORD_{name}", text)
    with pytest.raises(SettingError, match=f"MOETRACE_RECORD_{name}='{text}': must be a positive integer"):
        plugin.register()


def test_without_the_variable_nothing_happens(monkeypatch):
    """vLLM is not even imported."""
    monkeypatch.delenv("MOETRACE_RECORD", raising=False)
    monkeypatch.setitem(__import__("sys").modules, "vllm", None)

    assert plugin.register() is None


def test_a_worker_is_followed_from_its_model_to_its_end(monkeypatch, recording, tmp_path):
    """Passes of the warm-up do not count; each step of vLLM is done, and gives back what it gave."""
    own, worker = recording()
    worker.load_model = lambda: "loaded"
    worker.compile_or_warm_up_model = lambda: worker.execute_model(scheduled(5, **DECODE))
    ended = []

    class Wrapper:
        def __init__(self, worker):
            self.worker = worker

        def shutdown(self):
            ended.append(self)

    worker.execute_model = Worker.execute_model.__get__(worker)  # not followed yet
    monkeypatch.setenv("MOETRACE_RECORD", str(tmp_path / "run.parquet"))
    monkeypatch.setattr(Recording, "of_worker", lambda *_given: own)
    base = SimpleNamespace(WorkerWrapperBase=Wrapper)
    monkeypatch.setitem(sys.modules, "vllm.v1.worker.worker_base", base)
    plugin.register()
    plugin.register()  # again, as vLLM may
    wrapper = Wrapper(worker)

    assert ("loaded", "output") == (wrapper.load_model(), wrapper.compile_or_warm_up_model())
    worker.execute_model(scheduled(1, **DECODE))
    wrapper.shutdown()
    trace = open_trace(tmp_path / "run.parquet")
    assert np.array_equal([counted(choices(1), range(2))], trace.counts)
    assert [wrapper] == ended
    Wrapper(None).shutdown()  # it failed before it had a model
    with pytest.raises(TraceError, match="is closed"):
        own._every.step()
