"""docs/formats.md says what the registry and the catalogue hold."""

import re

from conftest import ROOT

from moetrace.doctor import KINDS
from moetrace.formats import FORMATS

TEXT = (ROOT / "docs" / "formats.md").read_text(encoding="utf-8")


def test_every_format_is_in_the_table():
    """In the order in which they are tried."""
    assert list(FORMATS) == re.findall(r"^\| `([\w-]+)` \| .* \| yes \|$", TEXT, re.MULTILINE)


def test_every_finding_is_in_the_table_with_its_severity():
    """In the order of the catalogue."""
    rows = dict(re.findall(r"^\| `([\w-]+)` \| (error|warning|note) \|", TEXT, re.MULTILINE))

    assert {name: kind.severity for name, kind in KINDS.items()} == rows


def test_the_page_stays_short():
    """It is read before a dump is ingested."""
    assert TEXT.count("\n") < 180
