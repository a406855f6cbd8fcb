"""Specs: a name and the settings that follow it."""

from dataclasses import dataclass
from typing import ClassVar, Literal

import pytest

from moetrace import SettingError
from moetrace.settings import label, setting_types, unknown, with_settings


@dataclass(frozen=True)
class Thing:
    """A setting of every type."""

    name: ClassVar[str] = "thing"
    count: int = 5
    offset: int = 0
    seed: int = 3
    share: float = 0.5
    order: tuple[int, int, int] = (1, 0, 0)
    strict: bool = False
    pattern: str | None = None
    experts: int | None = None
    phase: Literal["prefill", "decode"] | None = None


@pytest.mark.parametrize(
    "text",
    [
        "", "count=7", "offset=0", "seed=0", "share=0", "order=5,1,5:strict=true", "experts=64:phase=decode",
        "pattern=(?P<layer>.*):(?:x):layer=y", "pattern=a:b:experts=2",
    ],
)  # fmt: skip
def test_a_label_makes_the_same_thing(text):
    """Values of every type are read and written; text may hold colons."""
    thing = with_settings(Thing(), text)

    assert thing == with_settings(Thing(), label(thing).partition(":")[2])


def test_text_keeps_its_colons_up_to_the_next_setting():
    """As regular expressions have them."""
    thing = with_settings(Thing(), "pattern=moe:layer=(?:.*):experts=2")

    assert ("moe:layer=(?:.*)", 2) == (thing.pattern, thing.experts)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("size=3", "thing has no setting 'size'; it has count, offset"),
        ("count", "has no setting 'count'"),
        ("count=0", "thing:count is a whole number above 0, not '0'"),
        ("offset=-1", "is a whole number, 0 or more, not '-1'"),
        ("seed=-1", "is a whole number, 0 or more"),
        ("share=nan", "is a number, 0 or more"),
        ("strict=maybe", "is true or false"),
        ("order=1,2", "three whole numbers"),
        ("phase=both", "is prefill or decode"),
        ("experts=none", "is a whole number above 0"),
    ],
)
def test_nonsense_is_refused_with_what_there_is(text, said):
    """Settings and values."""
    with pytest.raises(SettingError, match=said):
        with_settings(Thing(), text)


def test_types_are_those_of_given_values():
    """None only says that a setting was not given."""
    types = setting_types(Thing())

    assert (int, str, int) == (types["count"], types["pattern"], types["experts"])


def test_a_slip_is_corrected():
    """The nearest name, and all there are; nothing is made up where none is near."""
    assert "there is no format 'cvs'; did you mean 'csv'? There are csv, numpy" == str(
        unknown("format", "cvs", ["csv", "numpy"])
    )
    assert "there is no format 'exel'; there are csv, numpy" == str(unknown("format", "exel", ["csv", "numpy"]))
