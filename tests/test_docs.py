"""The documents say what the program does: commands, output, code and links."""

import importlib.util
import re
import shutil
from pathlib import Path

import pytest
from bad_files import BOMBS, DEFECTS, FILES
from conftest import ROOT, thorough_but

from moetrace.forecasting.predictors import PREDICTORS
from moetrace.reporting import figures, paper
from moetrace.workspace.pages import OF_FIGURES

spec = importlib.util.spec_from_file_location("generate", ROOT / "docs" / "generate.py")
generate = importlib.util.module_from_spec(spec)
spec.loader.exec_module(generate)

README = (ROOT / "README.md").read_text()
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), ROOT / "sample_traces" / "README.md"]
# Documents for one kind of user, and the plan of a large trace, take long.
LONG = re.compile(r"moetrace (place|states|hot) gpt-moe-(128e|32e)|moetrace predict gpt-moe-128e")
BLOCKS = [(page, block) for page in generate.PAGES for block in generate.blocks(page.read_text())]
NUMBER = re.compile(r"-?\d[\d,]*\.?\d*")


def words_and_numbers(text):
    """The text without its numbers and layout, and the numbers."""
    numbers = [float(n.replace(",", "")) for n in NUMBER.findall(text)]
    return re.sub(r"[\s─-]+", " ", NUMBER.sub("#", text)), numbers


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    """Where the commands of all pages and examples run: each finds what those before it have computed."""
    return tmp_path_factory.mktemp("shared")


@pytest.fixture(scope="module")
def printed(tmp_path_factory, shared):
    """What a block prints, alone or after others: ``printed(page, block)``.

    Each page imports its traces into a workspace of its own. What other commands print depends on these traces alone,
    so each runs once for all pages, in the *shared* workspace, which gets the traces that the page has imported so far.
    """
    folders = {page: tmp_path_factory.mktemp(page.stem) for page in generate.PAGES}
    found, traces = {}, Path("moetrace-out", "traces")
    (shared / traces).mkdir(parents=True)

    def output(page, block):
        before = [other["command"] for other in generate.blocks(page.read_text()) if other.start() < block.start()]
        for command in (*before, block["command"]):
            if command.startswith("moetrace ingest") and (page, command) not in found:
                found[page, command] = generate.run(command, folders[page])
        if (page, block["command"]) in found:
            return found[page, block["command"]]
        if block["command"] not in found:
            for trace in (folders[page] / traces).glob("*.parquet"):
                shutil.copy(trace, shared / traces)
            found[block["command"]] = generate.run(block["command"], shared)
        return found[block["command"]]

    return output


@pytest.mark.parametrize(
    ("page", "block"),
    thorough_but([own for own in BLOCKS if not LONG.match(own[1]["command"])], BLOCKS),
    ids=[f"{page.stem}: {block['command'][:40]}" for page, block in BLOCKS],
)
@pytest.mark.slow
def test_console_blocks_show_what_is_printed(page, block, printed):
    """To 5 % of each number: the last digit of a fit may differ from processor to processor."""
    text, numbers = words_and_numbers(block["output"])
    found_text, found = words_and_numbers(printed(page, block))

    assert text.strip() == found_text.strip()
    assert numbers == pytest.approx(found, rel=0.05, abs=0.06)


def test_commands_are_those_of_the_program():
    """`make docs` has been run since the last change of a help text."""
    assert generate.commands() == generate.COMMANDS.read_text()


def test_findings_are_those_of_the_program():
    """Every kind, with its severity and what to do."""
    assert generate.findings() == generate.FINDINGS.read_text()


def test_the_python_reference_has_every_public_name():
    """Made from `__all__`."""
    assert generate.api() == generate.API.read_text()


def test_every_bad_file_is_in_its_page():
    """In the order in which the tests have them, each with a line that names the file."""
    rows = re.findall(r"^\| ([^|]+) \| `(.*)` \|$", generate.BAD_FILES.read_text(), re.MULTILINE)

    assert [*FILES, *DEFECTS, *BOMBS] == [fault for fault, _ in rows]
    named = {**{fault: made[0] for fault, made in (FILES | BOMBS).items()}, **dict.fromkeys(DEFECTS, "x.parquet")}
    assert [] == [fault for fault, line in rows if not line.startswith(named[fault])]


def test_the_gallery_has_every_figure_and_its_rows():
    """Pictures that are there, and names of tables that a report or `states` has."""
    page = (ROOT / "docs" / "gallery.md").read_text()
    drawn = {path.stem for path in generate.GALLERY.glob("*.png")}

    assert drawn == {*figures.FIGURES, *paper.FIGURES} == set(re.findall(r"\]\(gallery/(\w+)\.png\)", page))
    assert {"course", "load"} < set(re.findall(r"--table ([a-z_]+)", page)) <= {"summary", *OF_FIGURES}


@pytest.mark.parametrize("code", re.findall(r"```python\n(.*?)```", README, re.DOTALL))
@pytest.mark.slow
def test_python_blocks_run(code, monkeypatch):
    """As they stand, from the root of a checkout."""
    monkeypatch.chdir(ROOT)

    exec(compile(code, "README.md", "exec"), {"__name__": "readme"})


def examples():
    """The example of every help text."""
    return re.findall(r"^  Example: (moetrace .+(?:\n      .+)*)", generate.COMMANDS.read_text(), re.MULTILINE)


@pytest.mark.parametrize("example", thorough_but([own for own in examples() if " report " not in own], examples()))
@pytest.mark.slow
def test_the_example_of_every_help_runs(example, shared):
    """On the sample traces, after `moetrace ingest`."""
    if not (shared / "moetrace-out" / "traces" / "gpt-moe-8e-a.parquet").exists():
        generate.run("moetrace ingest --quiet", shared)

    generate.run(" ".join(example.split()), shared)


def test_every_command_has_an_example():
    """One for each heading of the page, except the program itself."""
    assert len(re.findall(r"^## moetrace \w", generate.COMMANDS.read_text(), re.MULTILINE)) == len(examples())


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    """Files that are named are there."""
    for target in re.findall(r"\]\((?!https?:|#)([^)#]+)", page.read_text()):
        assert (page.parent / target).exists(), target


@pytest.mark.parametrize("name", PREDICTORS)
def test_every_predictor_is_in_the_method(name):
    """By its name."""
    assert f"`{name}`" in (ROOT / "docs" / "method.md").read_text()


def test_every_page_is_in_the_menu_of_the_site():
    """And the menu names no page that is not there."""
    menu = (ROOT / "mkdocs.yml").read_text().partition("nav:")[2]

    assert {page.name for page in (ROOT / "docs").glob("*.md")} == set(re.findall(r"(\S+\.md)$", menu, re.MULTILINE))


def test_no_make_target_goes_unexplained():
    """`make help` lists every phony target."""
    text = Path(ROOT / "Makefile").read_text()

    assert set(re.findall(r"^\.PHONY: (\S+)", text, re.MULTILINE)) == set(
        re.findall(r"^([a-z-]+):.*## ", text, re.MULTILINE)
    )
