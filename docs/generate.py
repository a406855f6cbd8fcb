"""Writes what the documents take from the program: commands, findings, the Python reference, the lines that bad
files end in, the output of every console block, and the picture of a report's first screen.

Run it as `make docs`; `tests/test_docs.py` fails where the files are not what it would write.
"""

from __future__ import annotations

import ast
import contextlib
import io
import os
import re
import shlex
import shutil
import sys
import tempfile
from pathlib import Path
from unittest.mock import patch

from moetrace.cli import main
from moetrace.formats import sources

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"
COMMANDS = ROOT / "docs" / "commands.md"
FINDINGS = ROOT / "docs" / "findings.md"
API = ROOT / "docs" / "api.md"
BAD_FILES = ROOT / "tests" / "bad_files.md"
PICTURE = ROOT / "docs" / "report.png"
GALLERY = ROOT / "docs" / "gallery"
# Pages with console blocks; those of a page run one after the other in a workspace of its own.
PAGES = (README, *(ROOT / "docs" / f"{name}.md" for name in ("tutorial", "serving", "offload", "compare", "paper")))
DAMAGE = """# Bad files

Whatever is wrong with a source, `moetrace ingest` ends with exit code 1 and one line, and leaves everything as it was.
`make docs` makes this page from the files that the tests make; words of a library may differ from version to version.
One kind of damage gives no line: certain bits of the footer of a dump with lists make pyarrow abort the process
(17 of 7,168 flips, which `make fuzz` counts). Nothing is lost then either.

## Files of every kind

"""
# What the public names of a package are for, in the order of the Python reference; the first that fits counts.
TASKS = {
    "workspace.commands": "Commands", "workspace.contents": "Commands", "workspace.pages": "Commands",
    "workspace.found": "Commands",
    "formats": "Reading and writing traces", "trace": "Reading and writing traces",
    "synthetic": "Reading and writing traces",
    "record": "Recording", "analysis": "States and imbalance", "doctor": "States and imbalance",
    "forecasting": "Forecasting", "placement": "Placing experts", "residency": "Experts in fast memory",
    "comparison": "Comparing loads", "report": "Reports", "workspace": "Workspaces and workers", "errors": "Errors",
}  # fmt: skip
# A console block with one command; what stands below it is what the command prints.
BLOCK = re.compile(r"```console\n\$ (?P<command>[^\n]+)\n(?P<output>.*?)```", re.DOTALL)


def run(command: str, folder: Path) -> str:
    """What a moetrace *command* prints on stdout in *folder*, which sees the sample traces."""
    link = folder / "sample_traces"
    if not link.exists():
        link.symlink_to(ROOT / "sample_traces")
    program, *argv = shlex.split(command)
    assert program == "moetrace", f"only moetrace is run, not {command!r}"
    printed, said = io.TextIOWrapper(io.BytesIO(), encoding="utf-8"), io.StringIO()
    with (
        contextlib.chdir(folder),
        patch.dict(os.environ, {"COLUMNS": "110"}),
        contextlib.redirect_stdout(printed),
        contextlib.redirect_stderr(said),
    ):
        os.environ.pop("MOETRACE_WORKSPACE", None)
        assert main(argv) == 0, f"{command}: {said.getvalue()}"
    printed.seek(0)
    return printed.read()


def blocks(text: str) -> list[re.Match[str]]:
    """The console blocks of a page, in order; each may build on those before it."""
    return list(BLOCK.finditer(text))


def filled(page: Path) -> str:
    """A page with every console block as it comes out today."""
    with tempfile.TemporaryDirectory() as folder:
        return BLOCK.sub(
            lambda found: (
                f"```console\n$ {found['command']}\n{run(found['command'], Path(folder)).rstrip()}\n```".replace(
                    "\n\n```", "\n```"
                )
            ),
            page.read_text(),
        )


def commands() -> str:
    """The page of all commands with their help."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        listing = run("moetrace --help", folder).partition("Commands:\n")[2].partition("\n\n")[0]
        names = re.findall(r"^  (\S+)", listing, re.MULTILINE)
        lines = ["# Commands", "", "Made from the help texts by `make docs`.", ""]
        for command in ["", *names]:
            call = f"moetrace {command}".strip()
            lines += [f"## {call}", "", "```text", run(f"{call} --help", folder).rstrip(), "```", ""]
    return "\n".join(lines)


def damage() -> str:
    """The page of bad files with the one line that an ingest of each ends in; the tests make them."""
    sys.path.insert(0, str(ROOT / "tests"))
    from bad_files import BOMBS, DEFECTS, FILES, LITTLE_MEMORY

    tables = [
        table_of({fault: (file, content) for fault, (file, content, _) in FILES.items()}, 8 << 30),
        "## Parquet files with defects that writers have had",
        table_of({defect: ("x.parquet", make()) for defect, make in DEFECTS.items()}, 8 << 30),
        "## Small files that ask for a lot of memory, where there are 0.1 GiB",
        table_of({bomb: (file, make()) for bomb, (file, make, _) in BOMBS.items()}, LITTLE_MEMORY),
    ]
    return DAMAGE + "\n\n".join(tables) + "\n"


def table_of(faults: dict[str, tuple[str, bytes]], memory: int) -> str:
    """What is said of each bad file, name and content, where there are so many bytes of *memory*."""
    rows = ["| what is wrong | the line |", "|---|---|"]
    with (
        tempfile.TemporaryDirectory() as name,
        contextlib.chdir(name),
        patch.object(sources, "available", lambda: memory),
    ):
        for fault, (file, content) in faults.items():
            Path(file).write_bytes(content)
            said = io.StringIO()
            with contextlib.redirect_stderr(said):
                assert main(["ingest", file]) == 1, fault
            (line,) = said.getvalue().splitlines()
            rows.append(f"| {fault} | `{line.removeprefix('moetrace: ').replace('|', '/').replace('`', chr(39))}` |")
            Path(file).unlink()
    return "\n".join(rows)


def findings() -> str:
    """The page of all that the doctor finds."""
    from moetrace.doctor import KINDS

    rows = [f"| `{name}` | {kind.severity} | {kind.advice} |" for name, kind in KINDS.items()]
    lines = [
        "# Findings",
        "",
        "What `moetrace ingest` and `moetrace check` find in a trace.",
        "An error other than `collapse` stops an ingest unless it is accepted by its name, `--accept NAME`; the trace "
        "remembers that it was.",
        "",
        "| name | severity | what to do |",
        "|---|---|---|",
    ]
    return "\n".join([*lines, *rows]) + "\n"


def api() -> str:
    """The page of all public names, for mkdocstrings to fill."""
    import moetrace

    stub = ast.parse((ROOT / "moetrace" / "__init__.pyi").read_text())
    sources = [node for node in stub.body if isinstance(node, ast.ImportFrom)]
    homes = {alias.name: node.module for node in sources for alias in node.names}
    lines = ["# Python", "", "`import moetrace as mt`: whatever a command does, a function of the same word does.", ""]
    grouped: dict[str, list[str]] = {task: [] for task in TASKS.values()}
    for name in sorted(moetrace.__all__, key=str.lower):
        task = next(task for package, task in TASKS.items() if homes[name].startswith(package))
        grouped[task] += [f"::: moetrace.{homes[name]}.{name}", ""]
    for task, names in grouped.items():
        lines += [f"## {task}", "", *names] if names else []
    return "\n".join(lines)


def report(folder: Path) -> None:
    """A report on the sample traces in *folder*, with figures for the gallery."""
    run("moetrace ingest", folder)
    run("moetrace report --gpus 4 --figure-width 5.5in --folder report", folder)


def gallery(folder: Path) -> None:
    """Every figure of one trace, from the report in *folder*, in few colours: a tenth of the size."""
    from PIL import Image

    GALLERY.mkdir(exist_ok=True)
    for figure in (folder / "report" / "figures").glob("gpt-moe-8e-a-*.png"):
        few = Image.open(figure).convert("RGB").quantize(64)
        few.save(GALLERY / figure.name.removeprefix("gpt-moe-8e-a-"), optimize=True)


def picture(folder: Path) -> bytes:
    """The first screen of the report in *folder*, as a browser of 1,280 pixels shows it."""
    from playwright.sync_api import sync_playwright

    chromium = os.environ.get("CHROMIUM") or shutil.which("chromium")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox", "--disable-gpu"])
        page = browser.new_page(viewport={"width": 1280, "height": 1020})
        page.goto((folder / "report" / "report.html").as_uri())
        return page.screenshot()


if __name__ == "__main__":
    COMMANDS.write_text(commands())
    FINDINGS.write_text(findings())
    API.write_text(api())
    BAD_FILES.write_text(damage())
    for page in PAGES:
        page.write_text(filled(page))
    with tempfile.TemporaryDirectory() as name:
        report(Path(name))
        gallery(Path(name))
        PICTURE.write_bytes(picture(Path(name)))
