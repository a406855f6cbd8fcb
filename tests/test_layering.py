"""Layering: a package imports only from those above it, in no circle, and heavy libraries have their packages."""

import ast
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import pytest
import yaml
from conftest import ROOT

# From the bottom up; a package may import from those before it, and from itself.
ORDER = [
    "errors",
    "words",
    "files",
    "settings",
    "frames",
    "trace",
    "synthetic",
    "analysis",
    "doctor",
    "formats",
    "record",
    "forecasting",
    "placement",
    "residency",
    "comparison",
    "reporting",
    "workspace",
    "cli",
]
FENCES = {
    "pyarrow": ("formats", "workspace.results"),
    "statsmodels": ("forecasting.predictors.arima",),
    "jax": ("forecasting.predictors.network",),
    "equinox": ("forecasting.predictors.network",),
    "optax": ("forecasting.predictors.network",),
    "scipy": ("analysis.shape", "placement.plan", "forecasting.intervals"),
    "matplotlib": ("reporting",),
    "jinja2": ("reporting.pages",),
    "rich": ("reporting.tables", "reporting.screens", "cli"),
    "typer": ("cli",),
    "torch": ("placement.measure", "record", "formats.readers"),
    "gguf": ("formats.readers.imatrix",),
    "safetensors": ("formats.readers.tensorrt",),
    "tensorboard": ("formats.readers.tensorboard",),
    "duckdb": ("formats.readers.arrow",),
    "fsspec": ("formats.sources",),
    "transformers": ("record",),
    "vllm": ("record",),
    "lazy_loader": ("",),
    "orjson": ("record.arguments",),
    "psutil": ("files", "formats.sources"),
    "joblib": ("workspace.tasks",),
    "yaml": ("placement.systems",),
    "threadpoolctl": ("workspace.tasks",),
    "distributed": ("workspace.tasks",),
}
HEAVY = {"numpy", "pandas", "pyarrow", "statsmodels", "jax", "matplotlib", "torch", "scipy"}

PACKAGE = ROOT / "moetrace"
MODULES = sorted(PACKAGE.rglob("*.py"))


def name_of(path: Path) -> str:
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(part for part in parts if part != "__init__")


def imports(path: Path) -> list[str]:
    """Every module a file imports, wherever in it, as written."""
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            assert node.module is not None
            found += [f"{node.module}.{alias.name}" for alias in node.names]
    return found


NAMES = {name_of(path) for path in MODULES}


def module_of(imported: str) -> str:
    """The module of the package in which the imported name is."""
    name = imported.removeprefix("moetrace.")
    while name not in NAMES:
        name = name.rpartition(".")[0]
    return name


def test_the_listing_is_the_order():
    """What lies at the root are these packages and modules, and nothing else."""
    there = {path.stem for path in PACKAGE.iterdir() if path.suffix == ".py" or (path / "__init__.py").exists()}

    assert {*ORDER, "__init__", "__main__"} == there


@pytest.mark.parametrize("path", MODULES, ids=name_of)
@pytest.mark.slow
def test_a_package_imports_only_from_those_above(path):
    """By the order of the list."""
    package = name_of(path).partition(".")[0]
    if package in {"", "__main__"}:
        pytest.skip("the front door")
    for module in imports(path):
        if module.startswith("moetrace."):
            other = module.split(".")[1]
            assert ORDER.index(other) <= ORDER.index(package), f"{package} imports {module}"


@pytest.mark.slow
def test_no_module_is_in_a_circle():
    """Imports inside functions and for type checkers count too."""
    graph = {
        name_of(path): {module_of(m) for m in imports(path) if m.startswith("moetrace.")} - {name_of(path), ""}
        for path in MODULES
        if name_of(path)
    }

    assert list(TopologicalSorter(graph).static_order())


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_libraries_stay_in_their_packages(path):
    """pyarrow in the formats, statsmodels in arima, and so on."""
    name = name_of(path)
    for module in imports(path):
        allowed = FENCES.get(module.partition(".")[0])
        assert allowed is None or any(name == a or name.startswith(f"{a}.") for a in allowed), (
            f"{name} imports {module}"
        )


def test_report_sees_only_frames():
    """It knows no trace, no state, no predictor: besides itself, only how files and errors are written."""
    for path in (PACKAGE / "reporting").glob("*.py"):
        assert all(
            m.startswith(("moetrace.reporting", "moetrace.files", "moetrace.errors", "moetrace.words"))
            for m in imports(path)
            if "moetrace" in m
        )


def test_the_backtest_names_no_predictor():
    """It drives whatever the registry makes."""
    for path in (PACKAGE / "forecasting").glob("*.py"):
        named = {module_of(m) for m in imports(path) if m.startswith("moetrace.forecasting.predictors")}

        assert named <= {"forecasting.predictors", "forecasting.predictors.base"}, path


@pytest.mark.parametrize("argv", [["--help"], ["predict", "--help"], ["--version"]])
@pytest.mark.slow
def test_help_waits_for_no_heavy_library(argv):
    """None of them is imported, and neither is anything that needs them."""
    code = (
        "import sys; from moetrace.cli import main; main(sys.argv[1:]); "
        f"print(sorted({HEAVY!r} & set(sys.modules)), file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code, *argv], capture_output=True, text=True, check=True)

    assert "[]\n" == done.stderr


@pytest.mark.slow
def test_ingesting_for_json_waits_for_no_pandas(tmp_path):
    """It takes as long to load as a small trace to read."""
    code = (
        "import sys; from moetrace.cli import main; code = main(sys.argv[1:]); "
        "print(code, 'pandas' in sys.modules, file=sys.stderr)"
    )
    argv = ["ingest", ROOT / "sample_traces" / "gpt-moe-8e-a.parquet", "-w", tmp_path, "--json"]
    done = subprocess.run([sys.executable, "-c", code, *argv], capture_output=True, text=True, check=True)

    assert "0 False" == done.stderr.splitlines()[-1]


def test_every_sort_is_stable():
    """Which of equal values comes first depends on the vector instructions of the processor in any other sort."""
    sorts = [
        (path.name, call.lineno, {word.arg: ast.unparse(word.value) for word in call.keywords}.get("kind"))
        for path in (ROOT / "moetrace").rglob("*.py")
        for call in ast.walk(ast.parse(path.read_text()))
        if isinstance(call, ast.Call) and getattr(call.func, "attr", "") in ("argsort", "sort_values")
    ]

    assert len(sorts) > 20
    assert [(name, line) for name, line, kind in sorts if kind != "'stable'"] == []


def test_every_module_is_short():
    """No file of the package is longer than 500 lines."""
    assert [] == [name_of(path) for path in MODULES if len(path.read_text().splitlines()) > 500]


def test_every_package_is_changed_in_small_ways_each_week():
    """One that is missing there would have no floor; the modules outside of packages count as one."""
    packages = {path.parent.name for path in (ROOT / "moetrace").glob("*/__init__.py")}
    weekly = yaml.safe_load((ROOT / ".github" / "workflows" / "weekly.yml").read_text())

    assert {"moetrace", *packages} == set(weekly["jobs"]["mutants"]["strategy"]["matrix"]["package"])
