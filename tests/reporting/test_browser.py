"""The page in a real browser: nothing loaded, nothing broken, readable by everybody, at every width."""

import os
import shutil

import pandas as pd
import pytest
from reporting.test_report import frames_of

from moetrace.reporting.study import files_of
from moetrace.synthetic import settling, synthetic_trace

playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
CHROMIUM = os.environ.get("CHROMIUM") or shutil.which("chromium") or shutil.which("chromium-browser")
pytestmark = [
    pytest.mark.thorough,
    pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here: install it, or name it in CHROMIUM"),
]
HOSTILE = "<img src=x onerror=alert(1)> & 'all'"


@pytest.fixture(scope="module")
def page_file(tmp_path_factory):
    """The page of two synthetic traces, one of them with a name that is a tag, and with 13 layers."""
    courses = [settling(400 if layer != 3 else 1700, steps=1800, tokens=2000) for layer in range(13)]
    many = synthetic_trace(courses, name="many")
    one = synthetic_trace([settling(500, steps=1800)], name=HOSTILE)
    path = tmp_path_factory.mktemp("page") / "report.html"
    monkeypatch = pytest.MonkeyPatch()
    monkeypatch.setattr("moetrace.reporting.study.MOST_COURSES", 3)  # a browser looks at every point of a curve
    studies = {"many": frames_of(many, (300,)), HOSTILE: frames_of(one, (300,), gpus=4)}
    path.write_bytes(dict(files_of(studies, {"command": "moetrace report <b>"}, ()))["report.html"])
    monkeypatch.undo()
    return path


@pytest.fixture(scope="module")
def browser():
    """Chromium without a window."""
    with playwright.sync_playwright() as running:
        opened = running.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"])
        yield opened
        opened.close()


@pytest.fixture
def visit(browser, page_file):
    """Opens the page: ``visit(width=390)``; closes it again, having seen no error and no request."""
    contexts, complaints, requests = [], [], []

    def opened(width=1280, **more):
        context = browser.new_context(viewport={"width": width, "height": 900}, **more)
        contexts.append(context)
        page = context.new_page()
        page.on("console", lambda said: complaints.append(said.text))
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on("request", lambda request: requests.append(request.url))
        page.goto(page_file.as_uri())
        return page

    yield opened
    for context in contexts:
        context.close()
    assert [] == complaints
    assert {page_file.as_uri()} == {url for url in requests if not url.startswith("data:")}


LOOKS = {
    "light": {},
    "dark": {"color_scheme": "dark"},
    "phone": {"width": 390},
}


@pytest.mark.parametrize("look", LOOKS)
def test_axe_finds_nothing(visit, look):
    """With everything unfolded: contrast, names, roles, order of headings."""
    axe = pytest.importorskip("axe_playwright_python.sync_playwright", reason="axe is not installed")
    page = visit(**LOOKS[look])
    page.evaluate("document.querySelectorAll('details').forEach(part => part.open = true)")
    found = (
        axe.Axe().run(page, options={"resultTypes": ["violations"]}).response["violations"]
    )  # what passes takes long

    assert [] == [(each["id"], [node["html"][:200] for node in each["nodes"][:3]]) for each in found]


@pytest.mark.parametrize("width", [390, 800, 1280])
def test_the_page_is_never_wider_than_the_window(visit, width):
    """What is too wide scrolls in a region of its own."""
    page = visit(width=width)
    page.evaluate("document.querySelectorAll('details').forEach(part => part.open = true)")

    assert page.evaluate("document.documentElement.scrollWidth <= document.documentElement.clientWidth")


def test_a_click_on_a_heading_sorts_and_what_is_missing_stays_last(visit):
    """Up, then down; the heading says so."""
    page = visit()
    page.locator("details.explorer").first.evaluate("part => part.open = true")
    table = page.locator("table.bodies").first
    heading = table.locator("thead th", has_text="settles").first

    def column():
        return table.evaluate("t => [...t.tBodies].map(body => body.rows[0].cells[1].textContent.trim())")

    heading.locator("button").click()
    up = column()
    state_up = heading.get_attribute("aria-sort")
    heading.locator("button").click()
    down = column()
    numbers = [int(text.replace(",", "")) for text in up if text[0].isdigit()]

    assert ("ascending", "descending") == (state_up, heading.get_attribute("aria-sort"))
    assert sorted(numbers) == numbers
    assert numbers[::-1] == [int(text.replace(",", "")) for text in down if text[0].isdigit()]
    assert "never" not in up[: len(numbers)] + down[: len(numbers)]


def test_the_filter_shows_the_layers_that_hold_a_text(visit):
    """And says how many; the field is there only with scripts."""
    page = visit()
    page.locator("details.explorer").first.evaluate("part => part.open = true")
    page.locator(".filter input").first.fill("never-there")

    assert "0 of 13" == page.locator(".filter [role=status]").first.text_content()
    assert 0 == page.locator("table.bodies").first.locator("tbody:visible").count()


def test_the_keyboard_reaches_every_control(visit):
    """Regions that scroll, headings that sort, what unfolds, links: all by Tab."""
    page = visit()
    page.evaluate("document.querySelectorAll('section.trace')[0].remove()")
    controls = "a[href], button, summary, input, [tabindex='0']"
    wanted = page.evaluate(f'[...document.querySelectorAll("{controls}")].filter(e => e.checkVisibility()).length')
    reached = set()
    for _ in range(wanted + 5):
        page.keyboard.press("Tab")
        reached.add(page.evaluate(f'[...document.querySelectorAll("{controls}")].indexOf(document.activeElement)'))

    assert wanted == len(reached - {-1})


def test_hostile_names_are_text(visit):
    """A tag in the name of a trace is shown, not run."""
    page = visit()

    assert 0 == page.locator("img").count()
    assert HOSTILE in page.locator("h1").text_content()
    assert "moetrace report <b>" == page.locator(".meta code").text_content()


def test_all_is_there_without_scripts(visit):
    """Answers, figures and what unfolds; no dead field."""
    page = visit(java_script_enabled=False)
    page.locator("summary", has_text="All predictors").first.click()

    assert page.locator(".card .number").first.is_visible()
    assert page.locator("caption", has_text="Mean over layers and cutoffs").first.is_visible()
    assert not page.locator(".filter").first.is_visible()


def test_paper_shows_what_is_folded(visit, tmp_path):
    """Details are open in print, and closed again afterwards."""
    page = visit()
    page.emulate_media(media="print")
    page.evaluate("dispatchEvent(new Event('beforeprint'))")
    shown = page.locator("caption", has_text="Mean over layers and cutoffs").first.is_visible()
    wide = page.evaluate("Math.max(...[...document.querySelectorAll('table')].map(t => t.scrollWidth))")
    page.evaluate("dispatchEvent(new Event('afterprint'))")

    assert shown
    assert wide <= 1280
    assert not page.locator("summary", has_text="All predictors").first.evaluate("part => part.parentElement.open")


@pytest.mark.parametrize(("figure", "label"), [("The error of", "sw_avg"), ("stable by the end", "settle step")])
def test_a_figure_shows_the_values_under_the_pointer(visit, figure, label):
    """The nearest point of a curve with its label, axes and the name of its row; nothing once the pointer has left."""
    page = visit()
    holder = page.locator("figure", has_text=figure).first.locator(".pointed")
    panel = holder.locator("script").evaluate("s => JSON.parse(s.textContent)")[0]
    points = next(points for name, points in panel["curves"] if name == label)
    left, top, x, y = points[len(points) // 2]
    holder.evaluate("box => box.scrollIntoView()")
    box = holder.bounding_box()
    page.mouse.move(box["x"] + left * box["width"] / 10000, box["y"] + top * box["height"] / 10000)
    shown = holder.locator("output").text_content()
    page.mouse.move(0, 0)

    height = panel["names"][f"{y:g}"] if figure.startswith("stable") else f"{y:.3g}"
    assert shown.startswith(f"{label} \u00b7 {panel['x']} {x:,.0f} \u00b7 {panel['y']} {height}"[:60])
    assert holder.locator("output").is_hidden()


def test_a_figure_has_its_rows_within_the_page(visit):
    """As a compressed CSV: a page that was sent alone is complete."""
    import base64
    import gzip
    import io

    link = visit().locator("figure", has_text="The error of").first.locator("a[download]")
    rows = pd.read_csv(io.BytesIO(gzip.decompress(base64.b64decode(link.get_attribute("href").partition(",")[2]))))

    assert "trace-1-errors.csv.gz" == link.get_attribute("download")
    assert {"predictor", "cutoff", "error_rate"} < set(rows.columns)


def test_links_of_the_contents_open_what_is_folded(visit):
    """Each leads to a heading that is there."""
    page = visit()
    targets = page.locator("nav a").evaluate_all("links => links.map(link => link.hash.slice(1))")
    folded = page.locator("h3[id] + details:not([open])").first
    heading = folded.evaluate("part => part.previousElementSibling.id")
    page.locator(f"nav a[href='#{heading}']").click()

    assert 0 == sum(page.locator(f"[id='{target}']").count() != 1 for target in targets)
    assert page.locator(f"[id='{heading}'] + details").evaluate("part => part.open")
