"""Every field that a command prints or a report saves is on the page of fields, and nothing else is."""

import csv
import io
import json
import re
from pathlib import Path

import pandas as pd
import pyarrow.parquet as pq
import pytest
from conftest import ROOT, long_table

pytestmark = pytest.mark.thorough
# Of each row of the page: the field, its unit and its meaning.
ROWS = re.findall(r"^\| `(\w+)` \| (.*?) \| (.*) \|$", (ROOT / "docs" / "fields.md").read_text(), re.MULTILINE)
FIELDS = {name for name, unit, meaning in ROWS if unit and meaning}
QUICK = ("--predictor", "window_mean", "--predictor", "ema", "--quiet")
COMMANDS = {
    "ingest": ("ingest", "settled.parquet", "--quiet"),
    "list": ("list",),
    "check": ("check", "--quiet"),
    "states": ("states", "--experts", "--sensitivity"),
    "predict": ("predict", "--horizon", "700", *QUICK),
    "predictors": ("predict", "--list-predictors"),
    "place": ("place", "--gpus", "4", "--horizon", "700", *QUICK),
    "hot": ("hot", "--slots", "2", "--cold", "1", *QUICK),
    "compare": ("compare", "settled:1-2000", "settled:2001-", "--gpus", "4", "--slots", "2"),
    "report": ("report", "--horizons", "300,700", "--gpus", "4", *QUICK),
    "export": ("export", "settled", "--to", "csv", "-o", "x.csv", "--force"),
    "remove": ("remove", "settled"),
}
# Tables with columns that the documents have not.
TABLES = {"predict": ("summary", "scores", "means"), "states": ("movement", "fluctuation")}
# Fields whose values have the names of traces, of settings, or of whatever a dump says, for keys.
OPEN = ("forecasts", "means", "settings")


def names_in(value):
    """All keys within a document."""
    if isinstance(value, dict):
        for key, part in value.items():
            yield key
            if key not in OPEN:
                yield from names_in(part)
    elif isinstance(value, list):
        for part in value:
            yield from names_in(part)


@pytest.fixture
def seen(moetrace, settled, undrawn):
    """The fields of all documents, of all tables and of all files, by where they were seen."""
    table = long_table(settled).to_pandas()
    table.loc[table["step"] % 7 == 0, "tokens"] *= 2  # so that there is something to find
    pq.write_table(long_table(settled).from_pandas(table), "settled.parquet")
    found = {}
    for command, argv in COMMANDS.items():
        found[command] = set(names_in(moetrace(*argv, "--json").json))
        for name in TABLES.get(command, ()):
            rows = csv.reader(io.StringIO(moetrace(*argv, "--format", "csv", "--table", name).out))
            found[f"{command}, {name}"] = set(next(rows))
        if command == "predict":
            (forecast,) = Path("moetrace-out/predict").rglob("*.parquet")
            found["forecast file"] = set(pq.read_schema(forecast).names)
    for path in Path("moetrace-out/report/data").iterdir():
        if path.suffix == ".csv":
            found[path.name] = set(pd.read_csv(path).columns)
        elif path.suffix == ".parquet":
            found[path.name] = set(pq.read_schema(path).names)
        else:
            found[path.name] = set(names_in(json.loads(path.read_text())))
    return found


def test_every_field_has_a_unit_and_a_meaning(seen):
    """Wherever it occurs, and no field is described that occurs nowhere."""
    assert {} == {where: names - FIELDS for where, names in seen.items() if names - FIELDS}
    assert set() == FIELDS - set().union(*seen.values())


def test_fields_are_in_order_and_once():
    """A reader finds a name where the alphabet has it."""
    names = [name for name, _, _ in ROWS]

    assert sorted(set(names)) == names
