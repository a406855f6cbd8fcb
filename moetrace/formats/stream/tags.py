"""Names that hold a layer and an expert: tags of scalars, and columns named like them."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from moetrace.errors import TraceError, shown
from moetrace.formats.stream.values import SHARE_NAMES, UTILISATION_NAMES

PATTERN = r"layers?[_/.\-\[ ]?(?P<layer>\d{1,15}).*?experts?[_/.\-\[ ]?(?P<expert>\d{1,15})"
EXPERT_FIRST = r"experts?[_/.\-\[ ]?(?P<expert>\d{1,15}).*?layers?[_/.\-\[ ]?(?P<layer>\d{1,15})"
# Of a column for an expert of the layer that each row names.
EXPERT_ONLY = re.compile(r"experts?[_/.\-\[ ]?(\d{1,15})(?!\d)", re.IGNORECASE)
# Of a tag whose values are the counts of all experts.
VECTOR = r"layers?[_/.\-\[ ]?(?P<layer>\d{1,15})"
# Of a layer's or expert's number.
MOST_DIGITS = 15


@dataclass(frozen=True)
class Tags:
    """How tags are matched: the first of *patterns* that is found in one gives its layer and its expert."""

    patterns: tuple[re.Pattern[str], ...]

    @property
    def assumption(self) -> str:
        """What is said of it."""
        return f"tags are matched by {' or '.join(pattern.pattern for pattern in self.patterns)}"

    def match(self, tag: str, where: str) -> tuple[int, int] | None:
        """The layer and the expert in *tag*, None where it names none; no layer is layer 0.

        Raises `TraceError` for a group of the pattern that is no number.
        """
        for pattern in self.patterns:
            found = pattern.search(tag)
            if found is not None and "expert" in pattern.groupindex:
                layer = _number(found, "layer", where) if "layer" in pattern.groupindex else 0
                return layer, _number(found, "expert", where)
        return None

    def layer(self, tag: str, where: str) -> int | None:
        """The layer in the tag of a vector, None where it names none."""
        named = [pattern for pattern in self.patterns if set(pattern.groupindex) == {"layer"}]
        for pattern in named or [re.compile(VECTOR, re.IGNORECASE)]:
            found = pattern.search(tag)
            if found is not None:
                return _number(found, "layer", where)
        return None


def tags_by(pattern: str | None, where: str) -> Tags:
    """The tags that *pattern* matches, the usual ones if it is None; raises `TraceError` where it is none."""
    try:
        patterns = tuple(
            re.compile(text, re.IGNORECASE) for text in ([pattern] if pattern else [PATTERN, EXPERT_FIRST])
        )
    except re.error as error:
        raise TraceError(where, f"--pattern is no regular expression: {error}", "see the Python manual") from None
    if not {"layer", "expert"} & set(patterns[0].groupindex):
        raise TraceError(where, "--pattern names no layer and expert", "use (?P<layer>\\d+) and (?P<expert>\\d+)")
    return Tags(patterns)


def _number(match: re.Match[str], name: str, where: str) -> int:
    """The number that a group of the pattern found; raises `TraceError` when it is none that fits."""
    text = match[name] or ""
    if not text.isdecimal() or len(text) > MOST_DIGITS:
        raise TraceError(f"{where}, tag {match.string[:80]}", f"has {text[:80]!r} as its {name}", "check --pattern")
    return int(text)


def template(tag: str) -> str:
    """*tag* with # for its numbers: what tags of one kind have in common."""
    return re.sub(r"\d+", "#", tag)


def kind_of(tag: str) -> str:
    """What the values of a tag are, by the words in it: utilisation, shares, or else counts."""
    words = set(re.findall(r"[a-z]+", tag.lower()))
    return next((name for name in (*UTILISATION_NAMES, *SHARE_NAMES) if name in words), "tokens")


def no_match(tags: Sequence[str], what: str, where: str) -> TraceError:
    """That none of *tags* names a layer and an expert, with some of them, and the pattern that would fit."""
    numbered = [tag for tag in tags if len(re.findall(r"\d+", tag)) >= 2]
    way = f"give a pattern such as --pattern '{pattern_for(numbered[0])}'" if numbered else "is it the right file?"
    seen = shown(sorted(set(map(template, tags))), 5) if tags else "none"
    return TraceError(where, f"holds no rows: no {what} names a layer and an expert; there are {seen}", way)


def pattern_for(tag: str) -> str:
    """A pattern that fits *tag*: its first number is the layer, its last the expert."""
    parts = re.split(r"\d+", tag)
    escaped = [re.escape(part) for part in parts]
    groups = ["(?P<layer>\\d+)", *["\\d+"] * (len(parts) - 3), "(?P<expert>\\d+)"]
    return "".join(text + group for text, group in zip(escaped, [*groups, ""]))
