"""Names that hold a layer and an expert, such as tags of scalars and columns of tables."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from moetrace.errors import TraceError, shown
from moetrace.formats.stream.columns import SHARE_NAMES, UTILISATION_NAMES

# Between a word and its number, also as in labels of Prometheus: layer="3".
BETWEEN = r"(?:[_/.\-\[ ]|=\"?)?"
PATTERN = rf"layers?{BETWEEN}(?P<layer>\d{{1,15}}).*?experts?{BETWEEN}(?P<expert>\d{{1,15}})"
EXPERT_FIRST = rf"experts?{BETWEEN}(?P<expert>\d{{1,15}}).*?layers?{BETWEEN}(?P<layer>\d{{1,15}})"
# Of a tag whose values are the counts of all experts.
VECTOR = re.compile(r"layers?[_/.\-\[ ]?(?P<layer>\d{1,15})", re.IGNORECASE)
# Of a layer's or expert's number.
MOST_DIGITS = 15
# What an export of a chart adds to each of its columns.
OF_CHARTS = ("__MIN", "__MAX")


@dataclass(frozen=True)
class Tags:
    """How tags are matched: the first of *patterns* that is found in one gives its layer and its expert."""

    patterns: tuple[re.Pattern[str], ...]
    assumption: str

    def match(self, tag: str, where: str) -> tuple[int, int] | None:
        """The layer, 0 where none is meant, and the expert in *tag*, None where it names none."""
        for pattern in self.patterns:
            found = pattern.search(tag)
            if found is not None and "expert" in pattern.groupindex:
                layer = _number(found, "layer", where) if "layer" in pattern.groupindex else 0
                return layer, _number(found, "expert", where)
        return None

    def layer(self, tag: str, where: str) -> int | None:
        """The layer in the tag of a vector, None where it names none."""
        named = [pattern for pattern in self.patterns if set(pattern.groupindex) == {"layer"}]
        found = next((found for pattern in named or [VECTOR] if (found := pattern.search(tag))), None)
        return None if found is None else _number(found, "layer", where)


def tags_by(pattern: str | None, where: str) -> Tags:
    """The tags that *pattern* matches, the usual ones if it is None; raises `TraceError` where it does not compile."""
    texts = [pattern] if pattern else [PATTERN, EXPERT_FIRST]
    try:
        patterns = tuple(re.compile(text, re.IGNORECASE) for text in texts)
    except re.error as error:
        raise TraceError(where, f"--pattern is not a regular expression: {error}", "see the Python manual") from None
    if re.search(r"expert[^a-z]*\(\?P<layer>|layer[^a-z]*\(\?P<expert>", texts[0], re.IGNORECASE):
        raise TraceError(
            where, "--pattern takes an expert for a layer, or a layer for an expert", "exchange its groups"
        )
    if not {"layer", "expert"} & set(patterns[0].groupindex):
        raise TraceError(where, "--pattern names no layer and expert", "use (?P<layer>\\d+) and (?P<expert>\\d+)")
    return Tags(patterns, f"tags are matched by {' or '.join(texts)}")


def _number(match: re.Match[str], name: str, where: str) -> int:
    text = match[name] or ""
    if not text.isdecimal() or len(text) > MOST_DIGITS:
        raise TraceError(f"{where}, tag {match.string[:80]}", f"has {text[:80]!r} as its {name}", "check --pattern")
    return int(text)


def template(tag: str) -> str:
    """*tag* with # for its numbers: what tags of one kind have in common."""
    return re.sub(r"\d+", "#", tag)


def one_kind(tags: Sequence[str], seen: set[str], where: str) -> str:
    """What the values of *tags* are, utilisation, shares, or else counts; *seen* is what all so far have in common.

    Raises `TraceError` for two kinds.
    """
    seen.update(map(template, tags))
    if len(seen) > 1:
        first, second = sorted(seen)[:2]
        raise TraceError(where, f"has tags like {first} and like {second}", "choose one kind with --pattern")
    words = set(re.findall(r"[a-z]+", next(iter(seen), "").lower()))
    return next((name for name in (*UTILISATION_NAMES, *SHARE_NAMES) if name in words), "tokens")


def no_match(tags: Sequence[str], what: str, where: str) -> TraceError:
    """The error that none of *tags* names a layer and an expert, with some of them, and a pattern that would fit."""
    numbered = [tag for tag in tags if len(re.findall(r"\d+", tag)) >= 2]
    way_out = "is it the right file?"
    if numbered:
        parts = [re.escape(part) for part in re.split(r"\d+", numbered[0])]
        names = ["layer", "expert"]
        if re.search("expert.*layer", numbered[0], re.IGNORECASE):
            names.reverse()
        groups = [f"(?P<{names[0]}>\\d+)", *["\\d+"] * (len(parts) - 3), f"(?P<{names[1]}>\\d+)", ""]
        way_out = f"give a pattern such as --pattern '{''.join(map(str.__add__, parts, groups))}'"
    seen = shown(sorted(set(map(template, tags))), 5) if tags else "none"
    return TraceError(where, f"holds no rows: no {what} names a layer and an expert; there are {seen}", way_out)
