"""Changes a package in small ways, a random sample of all, and counts how many of the changes its tests notice.

mutmut makes the changes and runs, for each, the tests that reach the function that was changed. It leaves alone what
is decorated and what is set once in a module. Changes of strings alone are left out here, because most are of the
words of a message, and lines with the size or the look of a figure: tests of behaviour repeat neither.
"""

import argparse
import random
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import joblib
import libcst as cst
from mutmut import __main__ as mutmut
from mutmut.configuration import config
from mutmut.mutation import mutators
from mutmut.mutation.data import SourceFileMutationData
from mutmut.mutation.diff_apply import get_diff_for_mutant
from mutmut.stats import status_by_exit_code

FLOOR = 0.85
FOLDER = Path("mutants")  # mutmut's own
PACKAGES = sorted(path.parent.name for path in Path("moetrace").glob("*/__init__.py"))
# The name for the modules that are in no package; what they do is seen where they are used.
ROOT = "moetrace"
TESTS = {
    ROOT: [
        *(f"tests/test_{name}.py" for name in ("settings", "synthetic", "trace")),
        "tests/workspace",
        "tests/analysis",
        "tests/comparison",
        "tests/doctor",
        "tests/forecasting/test_plugins.py",
    ],
    # The parts of a recording, and the line that each bad file ends in.
    "formats": ["tests/formats", "tests/record", "tests/workspace/test_faults.py"],
    "placement": ["tests/placement", "tests/with_torch/test_measure.py"],
    "record": ["tests/record", "tests/with_torch"],
    # Answers and pages are those of commands.
    "reporting": ["tests/reporting", *(f"tests/cli/test_{name}.py" for name in ("compare", "one_answer", "screen"))],
    # What a command does is seen at its output, there and in Python.
    "workspace": ["tests/workspace", "tests/cli", "tests/test_parity.py", "tests/test_python.py"],
}
# What tests read beside the package and themselves.
READ = ["sample_traces", "docs", "benchmarks", "README.md", "Makefile"]
PAIRS = [("any", "all"), ("min", "max"), ("argmin", "argmax"), ("minimum", "maximum"), ("floor", "ceil")]
# Lines with the size of a figure, and how its marks and letters look.
LOOKS = [
    r"(one_panel|several_panels|new_figure|_panels|margins)\(",
    r"\b(linewidths?|markersize|fontsize|labelsize|alpha|zorder|fraction|aspect|xytext|figsize|wspace|ncols|va|ha|cmap|(header|title)_style)(\": |=)",
]
# Parts of the names of tests that start processes, which find no settings of mutmut in a folder of their own: they end
# before anybody expects it, or are waited for for ever.
PROCESSES = [
    "test_tasks_dask", "test_harm", "test_memory", "test_plugins", "process", "jobs", "in_a_folder_are", "changes_under",
    "progress_counts", "kill", "interrupt", "closed_pipe", "permissions", "full_disk", "threads", "another_predictor",
    "are_not_loaded",
]  # fmt: skip
SWAPS = dict([*PAIRS, *(pair[::-1] for pair in PAIRS)])


def main() -> int:
    """0 where every package catches enough of its changes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("package", nargs="?", choices=[ROOT, *PACKAGES], help=f"all without; {ROOT}: modules of none")
    parser.add_argument("--sample", type=int, default=120, help="changes of a package")
    parser.add_argument("--seed", type=int, default=1)
    asked = parser.parse_args()
    if asked.package:
        return int(share_caught(asked.package, asked.sample, asked.seed) < FLOOR)
    rest = ["--sample", str(asked.sample), "--seed", str(asked.seed)]
    return max(subprocess.call([sys.executable, __file__, name, *rest]) for name in [ROOT, *PACKAGES])


def share_caught(package: str, sample: int, seed: int) -> float:
    """Run a sample of the changes of one package, print how many were caught, and write the others to a file."""
    shutil.rmtree(FOLDER, ignore_errors=True)
    FOLDER.mkdir()
    for name in READ:
        (FOLDER / name).symlink_to(Path(name).absolute())
    settings = config()
    settings.only_mutate = ["moetrace/*.py"] if package == ROOT else [f"moetrace/{package}/*.py"]
    others = [f"moetrace/{name}/*.py" for name in PACKAGES if name != package]
    settings.do_not_mutate = [*others, "moetrace/record/vllm.py"]  # tested in vLLM itself (`make test-systems`)
    settings.do_not_mutate_patterns = LOOKS if package == "reporting" else []
    settings.pytest_add_cli_args = ["-m", "not thorough", "-k", f"not ({' or '.join(PROCESSES)})"]
    settings.pytest_add_cli_args_test_selection = TESTS.get(package, [f"tests/{package}"])
    known = [(node, change) for node, change in mutators.mutation_operators if change is not mutators.operator_string]
    mutators.mutation_operators[:] = [*known, (cst.Name, swapped)]

    with mutmut.CatchOutput():
        mutmut.copy_src_dir()
        mutmut.create_mutants(joblib.cpu_count())
    names = sorted(exit_codes())
    names = random.Random(seed).sample(names, min(sample, len(names)))
    mutmut._run(names, joblib.cpu_count())

    status = {name: status_by_exit_code[code] for name, code in exit_codes().items()}
    missed = sorted(name for name in names if status[name] not in ("killed", "timeout", "segfault"))
    survivors = Path(f"mutants-{package}.diff")
    survivors.write_text("".join(f"# {name}: {status[name]}\n{get_diff_for_mutant(name)}\n\n" for name in missed))
    caught = len(names) - len(missed)
    print(
        f"{package}: {caught} of {len(names)} changes caught ({caught / len(names):.1%}), seed {seed}; rest: {survivors}"
    )
    return caught / len(names)


def exit_codes() -> dict[str, int | None]:
    """That of the tests for each change of the package, None where they were not run."""
    found = [SourceFileMutationData(path=path) for path in mutmut.walk_mutatable_files()]
    for data in found:
        data.load()
    return {name: code for data in found for name, code in data.exit_code_by_key.items()}


def swapped(node: cst.Name) -> Iterator[cst.Name]:
    """``any`` for ``all`` and the like, which mutmut does not do."""
    if node.value in SWAPS:
        yield node.with_changes(value=SWAPS[node.value])


if __name__ == "__main__":
    sys.exit(main())
