"""What a person sees at the terminal: the answer, what was written, what comes next, help, and progress."""

import pyarrow.parquet as pq
import pytest
import typer
from conftest import long_table

from moetrace.cli import output
from moetrace.cli.options import bytes_of

QUICK = ("--predictor", "window_mean", "--predictor", "ema", "--horizon", "700")
COMMANDS = ("ingest", "states", "predict", "report", "place", "hot", "list", "remove", "check", "export")


@pytest.fixture
def ingested(moetrace, settled, tmp_path, monkeypatch):
    """A workspace with two traces, seen on 100 columns."""
    for name in ("one", "two"):
        pq.write_table(long_table(settled), tmp_path / f"{name}.parquet")
        assert 0 == moetrace("ingest", tmp_path / f"{name}.parquet").code
    monkeypatch.setenv("COLUMNS", "100")
    return moetrace


@pytest.mark.parametrize(
    ("argv", "then"),
    [
        (("list",), "Next: moetrace states"),
        (("states", "one"), "Next: moetrace predict one"),
        (("predict", "one", *QUICK), "Next: moetrace place one --gpus N"),
        (("place", "one", "--gpus", "4", *QUICK), ""),
        (("hot", "one", "--slots", "3", *QUICK), ""),
        (("check",), ""),
    ],
)
@pytest.mark.slow
def test_an_answer_fits_100_columns_and_names_the_next_command(ingested, argv, then):
    """One sentence, one table with one line of headings; notes are on stderr, and quiet has none."""
    done, quiet = ingested(*argv), ingested(*argv, "-q")

    assert 0 == done.code
    assert max(map(len, done.out.splitlines())) <= 100
    assert done.out.splitlines()[0].endswith((".", ",")) or " " in done.out.splitlines()[0]
    assert then in done.err
    assert (done.out, "") == (quiet.out, quiet.err)


@pytest.mark.slow
def test_the_next_command_can_be_copied(ingested, tmp_path, monkeypatch):
    """Names with spaces are one word, and it is for the same workspace."""
    assert 0 == ingested("ingest", tmp_path / "one.parquet", "--name", "run A").code
    elsewhere = str(tmp_path / "cwd" / "moetrace-out")
    said = {where: ingested("states", "run A", *where).err for where in ((), ("-w", elsewhere))}

    assert "Next: moetrace predict 'run A'\n" in said[()]
    assert f"moetrace predict 'run A' -w {elsewhere}\n" in said["-w", elsewhere]
    monkeypatch.setenv("MOETRACE_WORKSPACE", elsewhere)
    assert "Next: moetrace predict 'run A'\n" in ingested("states", "run A").err


@pytest.mark.slow
@pytest.mark.usefixtures("undrawn")
@pytest.mark.thorough
def test_a_report_says_which_horizon_can_be_scored(ingested, tmp_path):
    """Where none of the usual ones can, a quarter of the trace; one longer than the trace is refused."""
    done = ingested(
        "report", "one", "--steps", ":1400", "--folder", tmp_path / "r", "--figures", "none", "--gpus", 4, *QUICK[:4]
    )

    assert (0, 0, 1) == (done.code, done.out.count("Not measured"), done.out.count("Not enough evidence on 4 GPUs"))
    assert "steps are too few for a horizon of 1,000; the horizon is a quarter of them, 350" in done.err
    asked = ingested("report", "one", "--steps", ":1400", "--horizons", "1400", *QUICK[:4])
    assert (2, True) == (asked.code, "one: a horizon of 1,400 steps cannot be scored at cutoffs from" in asked.err)


@pytest.mark.thorough
def test_show_prints_the_tables_behind_an_answer(ingested):
    """Those named, or all; an unknown one is a usage error that names them; not with CSV."""
    windows, everything = ingested("states", "one", "--show", "windows"), ingested("states", "one", "--show", "all")

    assert windows.out.startswith("Ranges of steps in one state")
    assert all(title in everything.out for title in ("Layers", "Ranges of steps in one state", "By depth"))
    assert (2, True) == (lambda d: (d.code, "layers, windows" in d.err))(ingested("states", "--show", "nothing"))
    assert 2 == ingested("states", "--show", "windows", "--format", "csv").code


@pytest.mark.parametrize("command", COMMANDS)
def test_help_has_groups_and_plain_names_of_values(moetrace, command):
    """What is selected and how it is shown stand apart; no value is called after a type of Python."""
    said = moetrace(command, "--help").out

    assert all(f"\n{group}:\n" in said for group in ("Selection", "Output"))
    assert "int range" not in said
    assert "<str" not in said


def test_the_summaries_of_all_commands_fit_their_line(moetrace):
    """None is cut."""
    listing = moetrace("--help").out.partition("Commands:")[2].partition("\n\n")[0]

    assert set(COMMANDS) <= {line.split()[0] for line in listing.splitlines() if line.strip()}
    assert "..." not in listing


@pytest.mark.slow
def test_progress_off_a_terminal_is_a_line_now_and_then(ingested, monkeypatch):
    """With its unit, and which trace of how many; quiet has none."""
    monkeypatch.setattr(output, "PATIENCE", 0.0)
    said, quiet, none = (ingested("states", *more).err for more in ((), ("-q",), ("--no-progress",)))

    assert "states of one (1 of 2): 2 of 2 layers" in said
    assert "states of two (2 of 2): 1 of 2 layers" in said
    assert "" == quiet
    assert "layers (" not in none
    assert "of 2 layers" not in none


@pytest.mark.parametrize(
    ("text", "size"),
    [("44000000", 44e6), ("44e6", 44e6), ("44MB", 44e6), ("44 mb", 44e6), ("42MiB", 42 * 2**20), ("1.5G", 1.5e9),
     ("3kB", 3000), ("2TiB", 2 * 2**40), ("7B", 7)],
)  # fmt: skip
def test_sizes_are_read_with_their_unit(text, size):
    """As people write them; thousands, and 1,024s with an i."""
    assert size == bytes_of(text)


@pytest.mark.parametrize("text", ["", "MB", "-1", "44XB", "44,5MB", "nan", "1e999", "1e400"])
def test_what_is_no_size_is_refused(text):
    """With what would be one."""
    with pytest.raises(typer.BadParameter, match="such as 44e6, 44MB or 42MiB"):
        bytes_of(text)
