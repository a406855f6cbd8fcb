"""Recording in vLLM, as a plug-in: ``MOETRACE_RECORD=run.parquet vllm serve MODEL``.

vLLM loads `register` in each of its processes. A step is a forward pass of the scheduler. Profile runs, warm-up,
dummy runs and padding do not count. Two traces are written: that of all tokens, and ``run-decode.parquet`` beside it
with the decode tokens alone; ``moetrace ingest --phase`` tells them apart.

vLLM's own capturer keeps the chosen experts of a pass in a buffer on the device, before experts are mapped to replicas
and inside CUDA graphs too. They are counted there after the pass, copied to the host once, and written by a thread.

Run with vLLM 0.32 on a CPU, with and without compilation. Not run: CUDA (graphs, streams, pinned memory), model
runner V2, and several GPUs; those follow vLLM's sources.
"""

from __future__ import annotations

import atexit
import logging
import os
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from queue import Empty, Queue
from threading import Thread
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from moetrace.errors import SettingError, TraceError
from moetrace.record.arguments import trace_path
from moetrace.record.recorder import Recorder

# Choices that are counted at a time: their indices take 8 MiB, whatever the size of a pass.
CHUNK = 1 << 20
# Passes whose counts may wait for the thread that writes them, and seconds that a pass waits where all do.
WAITING, PATIENCE = 64, 1.0
# A kill, by which vLLM ends its workers, takes at most so many seconds. Writing takes 0.1 s, and memory for a block.
BLOCK_SECONDS, BLOCK_BYTES = 10.0, 32 << 20

Tensor = Any
logger = logging.getLogger("vllm.moetrace")  # below the logger that vLLM has set up


@dataclass(frozen=True)
class Settings:
    """What the environment asks for: *path* of the trace, each *every*-th pass, at most *megabytes* of parts."""

    path: Path
    every: int = 1
    megabytes: int | None = None

    @classmethod
    def of_environment(cls) -> Settings | None:
        """From MOETRACE_RECORD, MOETRACE_RECORD_EVERY and MOETRACE_RECORD_MB, None without the first.

        Raises `SettingError` for an invalid path or number.
        """
        given = os.environ.get("MOETRACE_RECORD")
        if not given:
            return None

        def number(name: str) -> int | None:
            text = os.environ.get(name)
            if text is not None and not (text.isdecimal() and int(text)):
                raise SettingError(f"{name}={text!r}: must be a positive integer")
            return None if text is None else int(text)

        path = trace_path(given).absolute()
        return cls(path, number("MOETRACE_RECORD_EVERY") or 1, number("MOETRACE_RECORD_MB"))


def register() -> None:
    """Record in the workers of this process where the environment asks for it; vLLM calls it.

    Each worker is followed from the loaded model to its end.
    """
    if Settings.of_environment() is None:
        return
    from vllm.v1.worker.worker_base import WorkerWrapperBase

    if hasattr(WorkerWrapperBase, "moetrace"):  # vLLM may call it again
        return
    shutdown = WorkerWrapperBase.shutdown

    def load_model(wrapper: Any, *args: Any, **kwargs: Any) -> Any:
        loaded = wrapper.worker.load_model(*args, **kwargs)
        settings = Settings.of_environment()
        # Before the memory is profiled and CUDA graphs are captured: both have to include it.
        wrapper.moetrace = None if settings is None else Recording.of_worker(wrapper.worker, settings)
        return loaded

    def compile_or_warm_up_model(wrapper: Any, *args: Any, **kwargs: Any) -> Any:
        done = wrapper.worker.compile_or_warm_up_model(*args, **kwargs)
        if wrapper.moetrace is not None:
            wrapper.moetrace.follow(wrapper.worker)  # what ran before was warm-up
        return done

    def end(wrapper: Any) -> None:
        if wrapper.moetrace is not None:
            wrapper.moetrace.close()
        shutdown(wrapper)

    WorkerWrapperBase.moetrace = None
    WorkerWrapperBase.load_model = load_model
    WorkerWrapperBase.compile_or_warm_up_model = compile_or_warm_up_model
    WorkerWrapperBase.shutdown = end


class Counter:
    """Counts on the device the experts in *chosen* (tokens, layers of the model, top_k), which every pass overwrites.

    *layers* are those that have experts, of *experts* each. All buffers are allocated once.
    """

    def __init__(self, chosen: Tensor, layers: list[int], experts: int) -> None:
        import torch

        self._chosen, self._experts, device = chosen, experts, chosen.device
        self._layers = torch.tensor(layers, device=device)
        # The last column is for what is no expert: models whose experts may do nothing number those beyond the others.
        self._counts = torch.zeros((2, len(layers), experts + 1), dtype=torch.int64, device=device)
        self._rows = torch.arange(len(layers), device=device)[:, None] * (experts + 1)
        self._ones = torch.ones(max(CHUNK, chosen.shape[0] * chosen.shape[2]), dtype=torch.int64, device=device)
        pinned = device.type == "cuda"
        self._hosts = [torch.zeros(self._counts.shape, dtype=torch.int64, pin_memory=pinned) for _ in range(WAITING)]
        self._events = [torch.cuda.Event() if pinned else None for _ in range(WAITING)]

    def count(self, tokens: int, decoding: NDArray[np.bool_], slot: int) -> None:
        """Count the first *tokens* rows into *slot*, apart by *decoding* (tokens,); the copy may still be under way."""
        import torch

        phase = torch.from_numpy(decoding).to(self._chosen.device, non_blocking=True)[:, None, None]
        rows = self._rows + phase * (self._counts.numel() // 2)  # (tokens, layers, 1)
        flat = self._counts.zero_().view(-1)
        at_once = max(1, CHUNK // max(1, tokens * self._chosen.shape[2]))
        for first in range(0, len(self._layers), at_once):
            part = slice(first, first + at_once)
            ids = self._chosen[:tokens].index_select(1, self._layers[part])  # (tokens, layers, top_k)
            index = (rows[:, part] + ids.clamp(-1, self._experts).remainder(self._experts + 1)).view(-1)
            flat.scatter_add_(0, index, self._ones[: len(index)])
        event = self._events[slot]
        self._hosts[slot].copy_(self._counts, non_blocking=event is not None)
        if event is not None:
            event.record()

    def take(self, slot: int) -> NDArray[np.int64]:
        """The counts in *slot*, shape (2, layers, experts), of prefill and of decode, once they have arrived."""
        if (event := self._events[slot]) is not None:
            event.synchronize()
        counts: NDArray[np.int64] = self._hosts[slot].numpy()[:, :, : self._experts]
        return counts


class Recording:
    """The traces of one worker, from the passes of its model runner; a thread of its own writes them.

    An error while it records ends the recording, with a line in the log; the server goes on.
    """

    def __init__(self, counter: Counter, layers: list[int], settings: Settings, path: Path, **about: Any) -> None:
        self._counter, self._layers, self._settings = counter, layers, settings
        self._every, self._decode = (
            Recorder(own, resume=True, block=2**31 - 1, **about)  # flushed together
            for own in (path, path.with_name(f"{path.stem}-decode{path.suffix}"))
        )
        self._step = self._every.last_step or 0
        if (self._decode.last_step or 0) > self._step:
            self._decode.resume_from(self._step)
        self._ended = self._late = self._closed = False
        self._pause = settings.path.with_suffix(".pause")  # the recording of all ranks stands still while it is there
        self._paused = self._pause.exists()
        self._free: Queue[int] = Queue()
        for slot in range(WAITING):
            self._free.put(slot)
        self._passes: Queue[tuple[int, int] | None] = Queue()
        self._writer = Thread(target=self._write, name="moetrace-recorder", daemon=True)
        self._writer.start()
        atexit.register(self.close, whole=False)  # no thread begins any more, and joining the parts needs one

    @classmethod
    def of_worker(cls, worker: Any, settings: Settings) -> Self | None:
        """Attach to the routers of *worker*, whose model is loaded; None on ranks that see the tokens of another.

        Raises `SettingError` for a model without experts, and for an unsupported setting.
        """
        import vllm
        from vllm.distributed.parallel_state import get_pp_group, get_tp_group
        from vllm.model_executor.layers.fused_moe.layer import MoERunner
        from vllm.model_executor.layers.fused_moe.routed_experts_capturer import (
            RoutedExpertsCapturer,
            RoutedExpertsCaptureSource,
            bind_routed_experts_capturer,
        )

        config = worker.vllm_config
        parallel, most = config.parallel_config, config.scheduler_config.max_num_batched_tokens
        if parallel.use_ubatching or parallel.prefill_context_parallel_size > 1:
            raise SettingError(
                "MOETRACE_RECORD: passes in two micro-batches or split prompts are not recorded; unset it"
            )
        if config.aux_output_config.enable_return_routed_experts:
            raise SettingError("MOETRACE_RECORD and enable_return_routed_experts use one hook: leave one of them out")
        model = worker.model_runner.get_model()
        kinds = (MoERunner, RoutedExpertsCaptureSource)
        layers = sorted({module.layer_id for module in model.modules() if isinstance(module, kinds)})
        if not layers:
            raise SettingError("MOETRACE_RECORD: the model has no MoE layers; unset it")
        capturer = RoutedExpertsCapturer(max_num_batched_tokens=most, vllm_config=config)
        bind_routed_experts_capturer(model, capturer)  # on all ranks: they may gather from each other
        if not get_tp_group().is_first_rank:
            return None
        experts = config.model_config.get_num_experts()
        sizes = ("data_parallel_size", "tensor_parallel_size", "pipeline_parallel_size", "enable_expert_parallel")
        notes = {name: getattr(parallel, name) for name in sizes}
        notes |= {"vllm": vllm.__version__, "every": settings.every, "max_num_batched_tokens": most}
        ranks = f".rank{parallel.data_parallel_rank}" if parallel.data_parallel_size > 1 else ""
        ranks += f".stage{get_pp_group().rank_in_group}" if parallel.pipeline_parallel_size > 1 else ""
        path = settings.path.with_name(f"{settings.path.stem}{ranks}{settings.path.suffix}")
        top_k = config.model_config.get_num_experts_per_tok()
        name = Path(config.model_config.model).name  # of a folder or of a hub
        logger.info("recording %d MoE layers of %d experts to %s", len(layers), experts, path)
        counter = Counter(capturer.device_buffer, layers, experts)
        return cls(counter, layers, settings, path, model=name, top_k=top_k, notes=notes)

    def follow(self, worker: Any) -> None:
        """Count each pass of *worker* from now on."""
        runner = worker.model_runner
        execute, dummy = runner.execute_model, worker.execute_dummy_batch

        def execute_model(scheduled: Any, *args: Any, **kwargs: Any) -> Any:
            output = execute(scheduled, *args, **kwargs)
            if not kwargs.get("dummy_run"):
                self.passed(runner, scheduled)
            return output

        def execute_dummy_batch() -> Any:
            self._step += 1  # another rank has a pass: their numbers stay the same
            return dummy()

        runner.execute_model, worker.execute_dummy_batch = execute_model, execute_dummy_batch

    def passed(self, runner: Any, scheduled: Any) -> None:
        """Count the pass that *runner* has just begun, of the tokens *scheduled*."""
        if not scheduled.total_num_scheduled_tokens:
            return
        self._step += 1
        if self._ended or self._paused or self._step % self._settings.every:
            return
        try:
            slot = self._free.get(timeout=0 if self._late else PATIENCE)
        except Empty:
            if not self._late:
                logger.warning("the disk is too slow: passes from %d on are not recorded until it answers", self._step)
            self._late = True
            return
        self._late = False
        try:
            self._counter.count(*batch_of(runner, scheduled), slot)
            self._passes.put((self._step, slot))
        except Exception:  # noqa: BLE001 - nothing ends the server
            self._end("recording has ended after an error; the server goes on", logger.exception)

    def _write(self) -> None:
        """Add passes to the traces as they come, and write them in blocks, until None comes; the thread's own."""
        held, written = 0, time.monotonic()
        item: tuple[int, int] | None = (0, 0)
        try:
            while item is not None:
                with suppress(Empty):
                    if (item := self._passes.get(timeout=1.0)) is not None:
                        held += self._keep(*item)
                paused = self._pause.exists()
                if paused != self._paused:
                    self._paused = paused
                    logger.info("recording is paused" if paused else "recording goes on")
                due = held >= BLOCK_BYTES or time.monotonic() >= written + BLOCK_SECONDS
                if held and (due or paused or item is None):
                    self._flush()
                    held, written = 0, time.monotonic()
        except Exception:  # noqa: BLE001 - nothing ends the server
            self._end("recording has ended after an error; the server goes on", logger.exception)

    def _keep(self, step: int, slot: int) -> int:
        """Add the counts in *slot* to the traces as *step*; returns their bytes."""
        phases = self._counter.take(slot)
        if phases[1].any():
            self._decode.add_layers(self._layers, phases[1])
            self._decode.step(step)
        self._every.add_layers(self._layers, phases.sum(axis=0))
        self._every.step(step)
        self._free.put(slot)
        return phases.nbytes

    def _flush(self) -> None:
        """Write what is held, decode first: after a kill it lacks no pass that the other trace has."""
        size = 0
        for recorder in (self._decode, self._every):
            recorder.flush()
            size += sum(part.stat().st_size for part in recorder.path.with_suffix(".parts").glob("*.parquet"))
        if self._settings.megabytes is not None and size > self._settings.megabytes * 10**6:
            self._end(f"recording has ended: it takes {size / 1e6:.1f} MB", logger.warning)

    def _end(self, message: str, log: Callable[[str], None]) -> None:
        if not self._ended:
            self._ended = True
            log(message)

    def close(self, *, whole: bool = True) -> None:
        """Write what is held, and make the traces of their parts unless not *whole*; does nothing the second time."""
        if self._closed:
            return
        self._closed = True
        self._passes.put(None)
        self._writer.join()
        self._ended = True
        for recorder in (self._decode, self._every):
            try:
                with suppress(TraceError):  # no step was recorded
                    (recorder.close if whole else recorder.release)()
            except Exception:
                logger.exception("%s is not made one file; its parts are kept", recorder.path)


def batch_of(runner: Any, scheduled: Any) -> tuple[int, NDArray[np.bool_]]:
    """How many tokens the pass had, and which of them were decoded (tokens,), in the order in which it computed them.

    A request decodes once its prompt is computed; what is computed again after a preemption is prefill.
    """
    state = getattr(runner, "execute_model_state", None)
    batch = getattr(state, "input_batch", None)
    if batch is not None:  # model runner V2
        rows, decodes, tokens = batch.num_scheduled_tokens, ~batch.is_prefilling_np, int(batch.num_tokens)
    else:
        batch = runner.input_batch
        rows = np.array([scheduled.num_scheduled_tokens[request] for request in batch.req_ids])
        decodes = (batch.num_computed_tokens_cpu >= batch.num_prompt_tokens)[: len(rows)]
        tokens = scheduled.total_num_scheduled_tokens
    return tokens, np.repeat(np.asarray(decodes, bool), rows)[:tokens]
