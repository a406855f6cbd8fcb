"""What fuzzing once found: read or refused in one line ever since."""

from pathlib import Path

import pytest
from fuzz.readers import CASES, GOOD, outcome

KEPT = sorted(path for path in CASES.iterdir() if path.is_dir())


@pytest.mark.parametrize("case", KEPT, ids=lambda path: path.name)
def test_a_case_that_once_went_wrong_does_no_more(case):
    """By the reader of its format, and by whichever claims it."""
    dump: Path = min(case.iterdir())
    for format in (case.name.rpartition("-")[0].partition("+")[0], None):
        assert outcome(dump, format) in GOOD
