"""The report as a page: sections of text, tables and figures, in Markdown and in one HTML file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from moetrace.report.tables import markdown, markdown_text, readable

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True)
class Section:
    """A heading, a sentence or two, tables by caption, and figures: (caption, file name, PNG)."""

    title: str
    text: str = ""
    tables: Mapping[str, pd.DataFrame] = field(default_factory=dict)
    figures: Sequence[tuple[str, str, bytes]] = ()


def as_markdown(title: str, sections: Sequence[Section], facts: Mapping[str, str]) -> str:
    """The page in Markdown; figures are the PNG files beside it."""
    lines = [f"# {markdown_text(title)}", ""]
    for section in sections:
        lines += [f"## {markdown_text(section.title)}", ""]
        lines += [markdown_text(section.text), ""] if section.text else []
        for caption, frame in section.tables.items():
            lines += [f"**{caption}**", "", markdown(frame)]
        for caption, file, _ in section.figures:
            lines += [f"![{caption}]({file})", ""]
    lines += ["## How this was made", "", *(f"- {name}: {markdown_text(value)}" for name, value in facts.items())]
    return "\n".join(lines) + "\n"


def as_html(title: str, sections: Sequence[Section], facts: Mapping[str, str]) -> str:
    """The page as one HTML file that loads nothing: figures are inside it."""
    import base64

    from jinja2 import Environment, PackageLoader

    environment = Environment(
        loader=PackageLoader("moetrace.report", "."), autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters["base64"] = lambda data: base64.b64encode(data).decode("ascii")
    environment.filters["readable"] = readable
    return environment.get_template("page.html.j2").render(title=title, sections=sections, facts=facts)
