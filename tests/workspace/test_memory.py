"""Memory that arrays give back stays with the commands and their workers."""

import platform
import subprocess
import sys

import pytest

CODE = """
import resource, sys
import numpy as np
if sys.argv[1] == "keep":
    from moetrace.workspace.memory import keep_freed_memory
    keep_freed_memory()
for _ in range(30):
    held = [np.ones(1_000_000) for _ in range(8)]  # 64 MB, more than glibc keeps by itself
    del held
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other allocators have no such settings")
@pytest.mark.slow
def test_pages_are_asked_for_once():
    """The same 64 MB, taken and given back 30 times, touch a fraction of the pages."""
    plain, kept = (
        int(subprocess.run([sys.executable, "-c", CODE, how], capture_output=True, text=True, check=True).stdout)
        for how in ("plain", "keep")
    )

    assert kept < plain / 2
