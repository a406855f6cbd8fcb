"""Looks at every page of the built site in Chromium with axe; exit code 1 where somebody could not read one.

`make site` runs it. Without Chromium (or its path in CHROMIUM) it says so and checks nothing.
"""

from __future__ import annotations

import os
import shutil
import sys
from collections import Counter
from pathlib import Path

from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import sync_playwright

CHROMIUM = os.environ.get("CHROMIUM") or shutil.which("chromium") or shutil.which("chromium-browser")
# The theme has a bar for copying in each block of code, and gives none of them a name.
OPTIONS = {"resultTypes": ["violations"], "rules": {"landmark-unique": {"enabled": False}}}


def violations(site: Path) -> Counter[str]:
    """Nodes that break a rule of axe, by page, colour scheme and rule."""
    found: Counter[str] = Counter()
    axe = Axe()
    with sync_playwright() as running:
        browser = running.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"])
        for scheme in ("light", "dark"):
            page = browser.new_page(color_scheme=scheme)  # type: ignore[arg-type]
            for path in sorted(site.glob("**/index.html")):
                page.goto(path.as_uri())
                for rule in axe.run(page, options=OPTIONS).response["violations"]:
                    name = f"{path.parent.relative_to(site)} {scheme} {rule['id']} ({rule['impact']})"
                    found[name] += len(rule["nodes"])
        browser.close()
    return found


def main(site: Path) -> int:
    """Print what was found."""
    if CHROMIUM is None:
        print("no Chromium here: the pages were not looked at")
        return 0
    found = violations(site)
    for name, nodes in found.items():
        print(f"{nodes:5} {name}")
    print(f"axe: {found.total()} nodes to mend")
    return bool(found)


if __name__ == "__main__":
    raise SystemExit(main(Path(sys.argv[1]).resolve()))
