"""What MkDocs calls while it builds the site: pages that lie elsewhere, examples, and formulas as MathML."""

import re
from html import unescape
from pathlib import Path

import griffe
from latex2mathml.converter import convert
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parent.parent
INCLUDED = re.compile(r'^--8<-- "(.+)"$', re.MULTILINE)
EXAMPLE = re.compile(r"^>>> .*(?:\n.+)*", re.MULTILINE)
# Wide tables scroll, with the keyboard too. An empty table heading becomes a plain cell.
WIDE = re.compile(r"<table>(?=\s*<thead>\s*<tr>(?:\s*<th[^>]*>.*?</th>){6})", re.DOTALL)
EMPTY = re.compile(r"<th( [^>]*)?></th>")
FORMULA = re.compile(r'<(span|div) class="arithmatex">\\[(\[](.*?)\\[)\]]</\1>', re.DOTALL)


def on_files(files: Files, config: MkDocsConfig) -> None:
    """The pictures and tables that the page of the benchmarks links to."""
    for path in sorted((ROOT / "benchmarks" / "results").iterdir()):
        if path.suffix in (".csv", ".svg"):
            files.append(File.generated(config, f"results/{path.name}", abs_src_path=str(path)))


def on_page_markdown(markdown: str, **_more: object) -> str:
    """A page of another folder, with its links as they are from `docs`."""
    return INCLUDED.sub(lambda found: (ROOT / found[1]).read_text().replace("](../docs/", "]("), markdown)


def on_page_content(html: str, **_more: object) -> str:
    """Tables that everybody can read, and formulas, which browsers draw themselves."""
    html = EMPTY.sub(r"<td\1></td>", WIDE.sub('<table tabindex="0">', html))
    return FORMULA.sub(
        lambda found: convert(unescape(found[2]), display="block" if found[1] == "div" else "inline"), html
    )


class Examples(griffe.Extension):
    """Examples in docstrings as code; their brackets would be links."""

    def on_object(self, *, obj: griffe.Object, **_more: object) -> None:
        """Called with each module, class, function and attribute, and what it documents."""
        if obj.docstring:
            obj.docstring.value = EXAMPLE.sub(lambda found: f"```pycon\n{found[0]}\n```", obj.docstring.value)
