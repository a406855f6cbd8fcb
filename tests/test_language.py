"""Plain technical English in what people read: the habits that kept coming back stay away."""

import re

import pytest
from conftest import ROOT

# What the text said, and what says it. The page of bad files is written by a command.
WORSE = {
    r"\btold\b(?! apart)": "shown, reported, known",
    r"\bsince when\b": "when",
    r"\bbetters?\b(?= the| it)": "improves",
    r"\bgo(?:ne|ing)? on with\b": "resume, continue",
    r"\bby who\b": "by whom, whose",
    r"\bin force\b": "deployed, current",
    r"\bplaces? in order\b": "default placement",
    r"\bmean loads\b(?! of)": "times the mean load",
    r"\brooms\b": "modules, packages",
}
PAGES = sorted(
    path
    for pattern in ("*.md", "docs/*.md", "benchmarks/**/*.md", "moetrace/**/*.py", "moetrace/**/*.html")
    for path in ROOT.glob(pattern)
    if path.name != "CODE_OF_CONDUCT.md"
)


@pytest.mark.parametrize("pattern", WORSE)
@pytest.mark.slow
def test_words_that_readers_stumble_over(pattern):
    """Each with the words that take its place."""
    found = [
        f"{path.relative_to(ROOT)}:{number}: {line.strip()[:100]}"
        for path in PAGES
        for number, line in enumerate(path.read_text().splitlines(), 1)
        if re.search(pattern, line, re.IGNORECASE)
    ]

    assert [] == found, f"say {WORSE[pattern]}"
