"""The page in a real browser, opened from the file system without a network: sorting, filters, opening, printing."""

import os
import re
import shutil

import pytest

from results import report
from results.ledger import Ledger

BROWSERS = ("chromium", "chromium-browser", "google-chrome")
PAPERS = """\
paper,table,row,label,model,dataset,num_classes,input_size,params_m,gflops,reported_by
mine,1,1,Mine-S,hivit_tiny,ImageNet-1K,11,96x96,18.7,4.6,own
mine,1,2,Mine-B,mine_b,ImageNet-1K,11,96x96,50.0,9.0,own
mine,2,1,Mine-S again,hivit_tiny,ImageNet-1K,11,96x96,20.0,4.6,own
yours,1,1,Yours,hrvit_b1,ImageNet-1K,11,96x96,8.2,2.7,own
"""


@pytest.fixture(scope="module")
def browser():
    playwright = pytest.importorskip(
        "playwright.sync_api", reason="Playwright is not installed (make test installs it)"
    )
    path = next(filter(None, map(shutil.which, BROWSERS)), None)
    if path is None:
        pytest.skip(f"no browser is installed: looked for {', '.join(BROWSERS)}")
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=path, args=["--no-sandbox"] if os.geteuid() == 0 else [])
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def address(tmp_path_factory, ragged_suite):
    output = tmp_path_factory.mktemp("page")
    for record in ragged_suite:
        Ledger(output / "ledger").put(record)
    (output / "papers.csv").write_text(PAPERS)
    return report.build(output, title="Demo", papers=[output / "papers.csv"]).report.as_uri()


@pytest.fixture
def open_page(browser, address):
    """Opens the page; at the end of the test nothing may have been asked of a network, nor have gone wrong."""
    contexts, requests, complaints = [], [], []

    def open_page(**settings):
        context = browser.new_context(offline=True, **{"viewport": {"width": 1400, "height": 900}} | settings)
        contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(10_000)
        page.on("request", lambda request: requests.append(request.url))
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on("console", lambda message: complaints.append(message.text) if message.type == "error" else None)
        page.goto(address)
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert requests
    assert all(url.startswith(("file:", "data:")) for url in requests)
    assert complaints == []


@pytest.fixture
def page(open_page):
    return open_page()


def section(page, name):
    """A part of the page, where a reader would be who uses it: a table far away is not laid out yet."""
    part = page.locator(f"section[aria-labelledby={name}]")
    part.evaluate("part => part.scrollIntoView()")
    return part


def column(part, heading):
    """The texts below a heading, of the rows that are shown."""
    headings = part.locator("thead th").all_inner_texts()
    index = next(i for i, text in enumerate(headings) if text.startswith(heading))
    rows = part.locator("tbody tr[data-group]:visible")
    return [
        cells[index] for cells in rows.evaluate_all("rows => rows.map(row => [...row.cells].map(c => c.innerText))")
    ]


def test_sorting_up_and_down(page):
    part = section(page, "classification")
    heading = part.get_by_role("columnheader", name="Latency")
    for direction in ("ascending", "descending"):
        heading.get_by_role("button").click()
        assert heading.get_attribute("aria-sort") == direction
        latencies = column(part, "Latency")
        numbers = [float(text.split("\n")[0].rstrip(" ★")) for text in latencies[:-1]]
        assert len(numbers) == 7
        assert numbers == sorted(numbers, reverse=direction == "descending")
        assert latencies[-1].startswith("failed")  # What was not measured is last both ways.
    part.get_by_role("columnheader", name="Model").get_by_role("button").click()
    assert part.locator("[aria-sort]").count() == 1
    assert column(part, "Model") == sorted(column(part, "Model"))


def test_filters_by_family_and_words_and_survives_sorting(page):
    part = section(page, "classification")
    said = part.get_by_role("status")
    assert said.inner_text() == "8 rows"
    assert not part.get_by_role("button", name="Show all").is_visible()
    part.get_by_role("checkbox", name="HiViT").focus()
    page.keyboard.press("Space")
    part.get_by_role("checkbox", name="Swin").check()
    assert sorted(column(part, "Family")) == ["HiViT", "Swin"]
    assert said.inner_text() == "2 of 8 rows: HiViT, Swin"
    part.get_by_label("Find").fill("TINY window7")
    assert column(part, "Family") == ["Swin"]
    assert said.inner_text() == "1 of 8 rows: HiViT, Swin, “tiny”, “window7”"
    part.get_by_label("Find").fill("tiny")
    part.get_by_role("columnheader", name="Params").get_by_role("button").click()
    assert column(part, "Family") == ["HiViT", "Swin"]
    part.get_by_label("Find").fill("no such words")
    assert said.inner_text().startswith("0 of 8 rows")
    assert len(column(section(page, "segmentation"), "Model")) == 8  # Each table has its own filter.
    part.get_by_role("button", name="Show all").click()
    assert part.get_by_label("Find").evaluate("field => field === document.activeElement")
    assert said.inner_text() == "8 rows"
    assert len(column(part, "Model")) == 8


def test_a_row_opens_what_it_was_made_from(page):
    part = section(page, "segmentation")
    name = part.get_by_role("button", name="hivit_tiny")
    assert name.get_attribute("aria-expanded") == "false"
    name.focus()
    for key, expanded in (("Space", "true"), ("Space", "false"), ("Enter", "true")):
        page.keyboard.press(key)
        assert name.get_attribute("aria-expanded") == expanded
    opened = part.locator("tr.origin")
    assert opened.locator("dl").count() == 4  # cost, speed, training, evaluation
    text = opened.inner_text()
    for expected in (
        "speed-seg-hivit_tiny-0",
        "e767ae7",
        "python runners/run.py suite=demo",
        "AMD EPYC 7763, 2 cores",
        "torch 2.15.0",
        "2026-11-20 10:20:27",
    ):
        assert expected in text
    assert (
        opened.get_by_role("link", name="record in the ledger").first.get_attribute("href").startswith("ledger/cost-")
    )
    part.get_by_role("columnheader", name="Params").get_by_role("button").click()
    above = opened.evaluate("row => row.previousElementSibling.cells[0].innerText")
    assert above.strip() == "hivit_tiny"  # It goes with its row.
    part.get_by_role("checkbox", name="MiT").check()
    assert not opened.is_visible()
    part.get_by_role("checkbox", name="HiViT").check()
    opened.get_by_role("link", name="All that the record holds").nth(1).click()
    record = page.locator("[id='record-speed-seg-hivit_tiny-0']")
    record.get_by_text("10 values, lowest").wait_for(state="visible")
    name.click()
    assert opened.count() == 0
    assert name.get_attribute("aria-expanded") == "false"


def test_a_link_shows_a_record_that_a_filter_hides(page):
    section(page, "records").get_by_role("checkbox", name="train").check()
    part = section(page, "classification")
    part.get_by_role("button", name="hivit_tiny").click()
    part.get_by_role("link", name="All that the record holds").first.click()
    page.locator("[id='record-cost-cla-hivit_tiny-0']").wait_for(state="visible")


def test_rebuilt_tables(page):
    part = section(page, "papers")
    table = page.locator("#mine_table_1")
    assert table.locator("summary").first.inner_text().startswith("Table 1: 4 numbers reported, 2 measured here")
    assert not table.locator("table").is_visible()
    part.get_by_text("What came of each table").click()
    part.locator("a[href='#mine_table_1']").first.click()
    table.locator("table").wait_for(state="visible")
    assert column(table, "MACs counted")[1] == "not run[1]"  # the footnote names what has no record
    table.get_by_role("button", name="Mine-S").click()
    assert "cost-cla-hivit_tiny-0" in table.locator("tr.origin").inner_text()
    assert table.get_by_role("button", name="Mine-B").count() == 0  # It has no record to show.
    part.get_by_role("checkbox", name="yours").check()
    assert part.get_by_role("status").inner_text() == "1 of 4 rows: yours"
    assert not table.is_visible()
    assert part.locator("h3:visible").all_inner_texts() == ["yours"]
    part.get_by_role("checkbox", name="yours").uncheck()
    part.get_by_label("Find").fill("again")
    assert part.locator("details[id] > summary:visible").all_inner_texts()[0].endswith("(1 of 1 rows)")
    verdicts = section(page, "verdicts")
    assert column(verdicts, "Verdict") == ["differs"]


def test_the_findings_are_a_page_of_their_own_and_lead_back(open_page):
    page = open_page(viewport={"width": 390, "height": 800})
    page.get_by_role("navigation").get_by_role("link", name="Findings").click()
    page.wait_for_url("**/findings.html")
    assert page.get_by_role("heading", level=1).inner_text() == "Findings: Demo"
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    part = section(page, "kinds")
    assert column(part, "Row") == ["Mine-S again"]
    part.get_by_role("searchbox").fill("no such words")
    assert part.get_by_role("heading", level=3).count() == 0  # a part without a row goes
    part.get_by_role("searchbox").fill("again")
    part.get_by_role("link", name="2", exact=True).click()
    page.locator("#mine_table_2 table").wait_for(state="visible")


@pytest.mark.parametrize("width", [390, 820, 1920])
def test_the_page_is_never_wider_than_the_screen(open_page, width):
    page = open_page(viewport={"width": width, "height": 800})
    page.locator("details").evaluate_all("parts => parts.forEach(part => part.open = true)")
    section(page, "cost").get_by_role("button", name="hivit_tiny").first.click()
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    cards = page.locator("tr.origin .cards")
    cards.scroll_into_view_if_needed()
    assert cards.bounding_box()["x"] + cards.bounding_box()["width"] <= width
    way = page.get_by_role("navigation")
    for title in ("Verdicts", "Segmentation", "Records"):  # from anywhere to anywhere
        way.get_by_role("link", name=title).click()
        page.wait_for_timeout(200)
        heading = page.get_by_role("heading", name=title, exact=True).bounding_box()
        assert way.bounding_box()["y"] == 0  # It stays in sight, and above what it leads to.
        assert way.bounding_box()["height"] <= heading["y"] < 150


def test_without_scripts_everything_is_shown(open_page):
    page = open_page(java_script_enabled=False)
    part = section(page, "classification")
    assert part.locator("tbody tr:visible").count() == 8
    assert page.locator("form:visible").count() == 0
    part.get_by_role("rowheader").get_by_role("link", name="hivit_tiny").click()
    page.locator("[id='record-cost-cla-hivit_tiny-0']").wait_for(state="visible")


def test_paper_shows_what_the_screen_shows(page):
    part = section(page, "classification")
    part.get_by_role("checkbox", name="HiViT").check()
    page.emulate_media(media="print")
    assert part.locator("tbody tr:visible").count() == 1
    assert part.get_by_role("status").is_visible()
    assert not section(page, "segmentation").get_by_role("status").is_visible()
    assert not page.get_by_role("navigation").is_visible()
    assert not part.get_by_label("Find").is_visible()


def test_dark_screens_read_dark_text_on_white(open_page):
    page = open_page(color_scheme="dark")
    colours = "[getComputedStyle(document.body).color, getComputedStyle(document.body).backgroundColor]"
    ink, ground = ([int(n) for n in re.findall(r"\d+", colour)] for colour in page.evaluate(colours))
    assert max(ink) < 80
    assert min(ground) > 240
