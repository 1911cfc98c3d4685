"""The page as people meet it: in a browser, in both themes, on a phone, on paper, with a keyboard."""

from __future__ import annotations

import base64
import dataclasses
import importlib.util
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from moe_bench.projection.forecast import forecast
from moe_bench.report.html.chart_file import write_chart
from moe_bench.report.html.page import render_page
from moe_bench.report.html.waterfall_chart import waterfall_chart
from moe_bench.results.metrics import run_metrics
from tests.report.pages import DEEPSEEK, QWEN, expected_marks, full_page, recipe, training_run

if TYPE_CHECKING:
    from tests.report.browser import Browser, Theme

pytestmark = pytest.mark.browser

PHONE_PX, DESKTOP_PX, PAPER_PX = 390, 1200, 688
"""The last is A4 less its margins, at 96 pixels per inch."""
TEXT_CONTRAST, MARK_CONTRAST = 4.5, 3.0
"""WCAG 2.2, success criteria 1.4.3 and 1.4.11."""
MAX_TABS = 400

OVERLAPS = """
const found = [];
for (const svg of document.querySelectorAll("figure svg[role=img]")) {
  const texts = [...svg.querySelectorAll("text")].filter(text => text.textContent.trim());
  const boxes = texts.map(text => text.getBoundingClientRect());
  for (let i = 0; i < boxes.length; i++) for (let j = 0; j < i; j++) {
    const [a, b] = [boxes[i], boxes[j]];
    const wide = Math.min(a.right, b.right) - Math.max(a.left, b.left);
    const high = Math.min(a.bottom, b.bottom) - Math.max(a.top, b.top);
    // a box has room for accents and descenders
    if (wide > 1 && high > 4) found.push([svg.parentElement.id, texts[j].textContent, texts[i].textContent]);
  }
}
return found;
"""

CUT_OFF = """
const whole = document.documentElement.getBoundingClientRect();
return [...document.querySelectorAll("text")].filter(text => {
  const box = text.getBoundingClientRect();
  return box.left < whole.left || box.right > whole.right || box.bottom > whole.bottom;
}).map(text => text.textContent);
"""

LUMINANCE = """
const channels = text => text.match(/[\\d.]+/g).map(Number);
const luminance = text => {
  const [r, g, b] = channels(text).slice(0, 3).map(value => value / 255)
    .map(value => value <= 0.04045 ? value / 12.92 : ((value + 0.055) / 1.055) ** 2.4);
  return 0.2126 * r + 0.7152 * g + 0.0722 * b;
};
const contrast = (a, b) => {
  const [low, high] = [luminance(a), luminance(b)].sort((x, y) => x - y);
  return (high + 0.05) / (low + 0.05);
};
const behind = element => {
  for (let one = element; one; one = one.parentElement) {
    const colour = getComputedStyle(one).backgroundColor;
    if (channels(colour)[3] !== 0) return colour;
  }
};
"""

POOR_TEXT = """
const found = [];
const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
let seen = 0;
while (walker.nextNode()) {
  const element = walker.currentNode.parentElement;
  const words = walker.currentNode.data.trim();
  if (!words || element.closest("title, desc, style")) continue;
  const style = getComputedStyle(element);
  const ink = element.ownerSVGElement ? style.fill : style.color;
  let paper = behind(element);
  if (element.classList.contains("stage-label")) {
    paper = getComputedStyle(element.ownerSVGElement.querySelector(".box.stage")).fill;
  }
  seen += 1;
  if (contrast(ink, paper) < arguments[0]) found.push(`${words}: ${ink} on ${paper}`);
}
return [seen, found];
"""

POOR_MARKS = """
const found = [];
for (const mark of document.querySelectorAll(".mark")) {
  const style = getComputedStyle(mark);
  const ink = style.stroke === "none" ? style.fill : style.stroke;
  if (contrast(ink, behind(mark)) < arguments[0]) found.push(`${mark.getAttribute("class")}: ${ink}`);
}
return [...new Set(found)];
"""

SIDEWAYS = """
document.querySelectorAll("details").forEach(one => one.open = arguments[0]);
const wide = document.documentElement.clientWidth;
const out = [...document.body.querySelectorAll("*")].filter(element => {
  const box = element.getBoundingClientRect();
  const clipped = getComputedStyle(element.closest("thead") ?? element).clipPath !== "none";
  return box.right > wide + 0.5 && !clipped;
});
return [document.documentElement.scrollWidth - wide, out.slice(0, 5).map(one => one.outerHTML.slice(0, 120))];
"""

FOCUSABLE = """
return [...document.querySelectorAll("a[href], input:checked, summary")]
  .map((element, index) => (element.dataset.order = index, index));
"""

FOCUSED = """
const element = document.activeElement;
const style = getComputedStyle(element);
return [element.dataset.order, style.outlineStyle !== "none" && parseFloat(style.outlineWidth) >= 1];
"""

CHARTS = """
return Object.fromEntries([...document.querySelectorAll("figure.chart")].map(figure => [figure.id, {
  stated: Number(figure.dataset.points),
  marks: figure.querySelectorAll(".mark, .cells rect").length,
  empty: [...figure.querySelectorAll(".mark, .cells rect")].filter(mark => {
    const box = mark.getBoundingClientRect();
    return box.width === 0 || box.height === 0;
  }).length,
  axes: [...figure.querySelectorAll(".axis-title")].map(title => title.textContent),
  table: figure.querySelectorAll("tbody tr").length,
  name: figure.querySelector("svg[role=img]").getAttribute("aria-labelledby").split(" ")
    .map(id => document.getElementById(id).textContent),
}]));
"""


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    programs = {name: shutil.which(name) for name in ("chromium", "chromedriver")}
    missing = [name for name, path in programs.items() if path is None]
    missing += [] if importlib.util.find_spec("selenium") else ["selenium"]
    if missing:
        reason = f"needs a browser, missing: {', '.join(missing)} (apt-get install chromium chromium-driver)"
        if os.environ.get("MOE_BENCH_CI_REQUIRED") == "1" or os.environ.get("CI") == "true":
            pytest.fail(reason)
        pytest.skip(reason)
    from tests.report.browser import started

    with started(
        str(programs["chromium"]), str(programs["chromedriver"]), tmp_path_factory.mktemp("profile")
    ) as one:
        yield one


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("page") / "report.html"
    path.write_text(render_page(full_page()), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def artefacts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where screenshots are kept: MOE_BENCH_ARTEFACTS, or a folder that pytest clears."""
    named = os.environ.get("MOE_BENCH_ARTEFACTS")
    folder = Path(named) if named else tmp_path_factory.mktemp("screenshots")
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def test_the_page_logs_nothing_and_asks_for_nothing_but_itself(browser: Browser, page: Path) -> None:
    browser.requests()
    browser.open(page, width=DESKTOP_PX)
    browser.ask("document.querySelectorAll('details').forEach(one => one.open = true)")
    assert browser.console() == []
    # the browser's own start page may still be loading
    asked = {address for address in browser.requests() if not address.startswith(("data:", "chrome://"))}
    assert asked == {page.as_uri()}


def test_values_can_be_read_out_of_the_page(browser: Browser, page: Path) -> None:
    browser.open(page, width=DESKTOP_PX)
    rows = browser.ask(
        "return [...document.querySelectorAll('#runs > table tbody tr')]"
        ".map(row => Object.fromEntries([...row.cells].map(cell => [cell.dataset.label, cell.innerText])))"
    )
    assert isinstance(rows, list)
    newest = next(row for row in rows if row["started (UTC)"] == "2026-11-20 11:00")
    metrics = run_metrics(full_page().records[1])
    assert newest["run"] == QWEN
    assert newest["tokens/s per rank"] == f"{metrics.tokens_per_s_per_gpu:,.0f}"
    assert newest["MFU"] == f"{metrics.mfu_fraction:.1%}"


def test_every_chart_is_named_has_two_axis_titles_and_all_its_marks(browser: Browser, page: Path) -> None:
    browser.open(page, width=DESKTOP_PX)
    charts = browser.ask(CHARTS)
    assert isinstance(charts, dict)
    for key, chart in charts.items():
        assert chart["marks"] == chart["stated"] > 0, key
        assert chart["empty"] == 0, key
        assert len(chart["axes"]) == 2, key
        assert all(chart["axes"]), key
        assert all(chart["name"]), key
        assert chart["table"] > 0, key
    for key, count in expected_marks(full_page()).items():
        assert charts[key]["marks"] == count, key


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_text_and_marks_stand_out_in_both_themes(browser: Browser, page: Path, theme: Theme) -> None:
    browser.open(page, width=DESKTOP_PX, theme=theme)
    browser.ask("document.querySelectorAll('details').forEach(one => one.open = true)")
    seen, poor = browser.ask(LUMINANCE + POOR_TEXT, TEXT_CONTRAST)
    assert seen > 1000
    assert poor == []
    assert browser.ask(LUMINANCE + POOR_MARKS, MARK_CONTRAST) == []


def test_the_reader_can_choose_the_other_theme(browser: Browser, page: Path) -> None:
    browser.open(page, width=DESKTOP_PX, theme="light")
    paper = "return getComputedStyle(document.body).backgroundColor"
    light = browser.ask(paper)
    browser.ask("document.getElementById('theme-dark').click()")
    assert browser.ask(paper) != light


@pytest.mark.parametrize("width", [PHONE_PX, 768, DESKTOP_PX])
@pytest.mark.parametrize("is_open", [False, True], ids=["values hidden", "values shown"])
def test_nothing_scrolls_sideways(browser: Browser, page: Path, width: int, is_open: bool) -> None:
    browser.open(page, width=width)
    assert browser.ask(SIDEWAYS, is_open) == [0, []]


@pytest.fixture(scope="module")
def close_losses(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A page whose losses differ in the fourth digit, so that ticks are as long as they get."""
    run = training_run()
    log = tuple(line.model_copy(update={"loss": 5.967 + 0.0003 * line.step}) for line in run.log)
    held_out = tuple(line.model_copy(update={"validation_loss": None}) for line in log)
    data = dataclasses.replace(full_page(), training=(dataclasses.replace(run, log=held_out),))
    path = tmp_path_factory.mktemp("close") / "report.html"
    path.write_text(render_page(data), encoding="utf-8")
    return path


@pytest.mark.parametrize("width", [PHONE_PX, 1024, 1400])
def test_no_text_of_a_chart_lies_on_another(browser: Browser, close_losses: Path, width: int) -> None:
    browser.open(close_losses, width=width)
    assert browser.ask(OVERLAPS) == []


def test_the_text_of_a_chart_file_lies_inside_it(browser: Browser, tmp_path: Path) -> None:
    path = tmp_path / "step.svg"
    longest = "deepseek_v3/h100_sxm_256g_fp8_blockwise_offload_seq16k (modified)"
    write_chart(waterfall_chart("waterfall", forecast(recipe(DEEPSEEK))), path, subject=longest)
    browser.open(path, width=DESKTOP_PX)
    assert browser.ask(CUT_OFF) == []


def test_text_in_charts_can_be_read_on_a_phone(browser: Browser, page: Path) -> None:
    browser.open(page, width=PHONE_PX)
    heights = browser.ask(
        "return [...document.querySelectorAll('figure.chart svg text')].map(text =>"
        " parseFloat(getComputedStyle(text).fontSize) * text.getScreenCTM().d)"
        ".filter(height => height > 0)"
    )
    assert isinstance(heights, list)
    assert min(heights) > 10


def test_paper_is_white_whatever_the_screen_and_nothing_is_cut(
    browser: Browser, page: Path, artefacts: Path
) -> None:
    browser.open(page, width=PAPER_PX, theme="dark", medium="print")
    assert browser.ask("return getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    assert browser.ask(SIDEWAYS, False) == [0, []]
    for name in (".theme", "nav", "summary"):
        shown = browser.ask("return document.querySelector(arguments[0]).getClientRects().length", name)
        assert shown == 0
    narrowest = browser.ask(
        "return Math.min(...[...document.querySelectorAll('figure.chart svg[role=img]')]"
        ".map(svg => svg.getBoundingClientRect().width))"
    )
    assert float(str(narrowest)) > PAPER_PX / 3
    printed = browser.command("Page.printToPDF", preferCSSPageSize=True, printBackground=True)
    (artefacts / "report.pdf").write_bytes(base64.b64decode(str(printed["data"])))


def test_the_tab_key_goes_through_the_page_in_its_order(browser: Browser, page: Path) -> None:
    browser.open(page, width=DESKTOP_PX)
    expected = browser.ask(FOCUSABLE)
    assert isinstance(expected, list)
    assert len(expected) > 40
    visited = []
    for _ in range(min(len(expected), MAX_TABS)):
        browser.press_tab()
        order, is_outlined = browser.ask(FOCUSED)
        assert is_outlined
        visited.append(int(order))
    assert visited == expected[:MAX_TABS]


@pytest.mark.parametrize("theme", ["light", "dark"])
@pytest.mark.parametrize("width", [PHONE_PX, DESKTOP_PX])
def test_screenshots_are_kept(
    browser: Browser, page: Path, artefacts: Path, width: int, theme: Theme
) -> None:
    browser.open(page, width=width, theme=theme)
    picture = browser.command("Page.captureScreenshot", captureBeyondViewport=True)
    path = artefacts / f"report-{theme}-{width}.png"
    path.write_bytes(base64.b64decode(str(picture["data"])))
    assert path.read_bytes().startswith(b"\x89PNG")
