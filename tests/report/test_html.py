"""The page holds what was measured and published, all of it, and nothing from elsewhere."""

import dataclasses
import re
from collections import Counter
from html.parser import HTMLParser
from pathlib import Path

import pytest

from moe_bench.cli import main
from moe_bench.report.html.page import ReportData, render_page
from moe_bench.results.metrics import run_metrics
from moe_bench.results.published import load_rows, row_by_id
from moe_bench.results.store import write_record
from moe_bench.results.training_health import append_health
from moe_bench.results.training_log import append_line
from moe_bench.results.training_run import begin_run
from moe_bench.spec.catalogue import data_root
from tests.report.pages import DEEPSEEK, QWEN, expected_marks, full_page, recipe, run, training_run

VOID = {"meta", "link", "br", "wbr", "input"}
FETCHING = {"src", "srcset", "data", "action", "poster", "background"}


class Page(HTMLParser):
    """Ids, attributes, text, and marks and axis titles by figure; asserts that tags match."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.ids: Counter[str] = Counter()
        self.attributes: list[tuple[str, str, str | None]] = []
        self.marks: Counter[str] = Counter()
        self.stated: dict[str, int] = {}
        self.axis_titles: dict[str, list[str]] = {}
        self.gpus: Counter[str] = Counter()
        self.words: list[str] = []
        self._open: list[tuple[str, dict[str, str | None]]] = []
        self.feed(text)
        assert self._open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        named = dict(attrs)
        self.attributes += [(tag, name, value) for name, value in attrs]
        if named.get("id"):
            self.ids[str(named["id"])] += 1
        figure = self._figure()
        classes = (named.get("class") or "").split()
        if figure and ("mark" in classes or (tag == "rect" and self._inside("cells"))):
            self.marks[figure] += 1
        if figure and "gpu" in classes:
            self.gpus[figure] += 1
        if tag == "figure" and "chart" in classes:
            self.stated[str(named["id"])] = int(named["data-points"] or -1)
        if tag not in VOID:
            self._open.append((tag, named))

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.handle_endtag(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop()[0] == tag

    def handle_data(self, data: str) -> None:
        if data.strip():
            self.words.append(data.strip())
            _, named = self._open[-1] if self._open else ("", {})
            if "axis-title" in (named.get("class") or ""):
                self.axis_titles.setdefault(self._figure(), []).append(data.strip())

    def _figure(self) -> str:
        return next((str(named["id"]) for tag, named in reversed(self._open) if tag == "figure"), "")

    def _inside(self, name: str) -> bool:
        return any(name in (named.get("class") or "").split() for _, named in self._open)

    @property
    def text(self) -> str:
        return " ".join(self.words)


@pytest.fixture(scope="module")
def html() -> str:
    return render_page(full_page())


@pytest.fixture(scope="module")
def page(html: str) -> Page:
    return Page(html)


def test_tags_match_and_ids_are_unique(page: Page) -> None:
    assert [name for name, times in page.ids.items() if times > 1] == []
    targets = {value for tag, name, value in page.attributes if (tag, name) == ("a", "href")}
    assert {target[1:] for target in targets if target and target.startswith("#")} <= set(page.ids)
    described = [value.split() for _, name, value in page.attributes if name == "aria-labelledby" and value]
    assert {name for names in described for name in names} <= set(page.ids)


def test_nothing_is_fetched_and_nothing_runs(page: Page, html: str) -> None:
    assert "<script" not in html
    assert not [one for one in page.attributes if one[1] in FETCHING or one[1].startswith("on")]
    links = {value for tag, name, value in page.attributes if tag == "link" and name == "href"}
    assert links == {"data:,"}
    style = html.split("<style>")[1].split("</style>")[0]
    assert "url(" not in style
    assert "@import" not in style
    assert "default-src 'none'" in html


def test_every_chart_has_two_axis_titles_and_the_units_of_its_quantities(page: Page) -> None:
    assert len(page.stated) > 12
    for figure in page.stated:
        assert len(page.axis_titles[figure]) == 2, figure
    assert page.axis_titles["steps-0"] == ["timed step", "step time (s)"]
    assert page.axis_titles["steps-1"] == ["timed step", "step time (ms)"]
    assert page.axis_titles["memory-0"] == ["memory (GiB)", "stage"]
    assert page.axis_titles["load-0"] == ["timed step", "max over mean (×)"]
    assert page.axis_titles["throughput"] == ["throughput (tokens/s per GPU)", "recipe"]
    assert page.axis_titles["scaling-0"] == ["GPUs (logarithmic)", "efficiency (%)"]


def test_every_chart_has_as_many_marks_as_data_points(page: Page) -> None:
    assert dict(page.marks) == page.stated
    for figure, count in expected_marks(full_page()).items():
        assert page.marks[figure] == count, figure


def test_every_gpu_of_a_job_is_drawn(page: Page) -> None:
    assert [page.gpus[f"layout-{index}"] for index in range(3)] == [16, 256, 128]


def test_the_page_says_what_was_measured_and_what_was_published(page: Page) -> None:
    metrics = run_metrics(full_page().records[1])
    assert f"{metrics.tokens_per_s_per_gpu:,.0f}" in page.text
    row = row_by_id(data_root() / "results" / "published", str(recipe(QWEN).reproduces))
    assert f"{row.tokens_per_s_per_gpu:,.0f} tokens/s/GPU" in page.text
    assert "3 published rows: 1 comparable with differences, 1 no verdict, 1 not run" in page.text
    assert "Not the recipe as asked" in page.text


def test_the_table_of_runs_holds_the_newest_and_says_how_many_there_are(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("moe_bench.report.html.page.MAX_OVERVIEW_RUNS", 2)
    table = render_page(full_page()).split('<section id="runs">')[1].split("</table>")[0]
    assert "The newest 2 runs" in table
    assert "lists all 3" in table
    assert table.count("<tr>") == 1 + 2
    assert "2026-11-20 09" not in table


def test_throughput_shows_the_row_its_neighbours_the_runs_and_the_projection(html: str) -> None:
    chart = html.split('id="throughput"')[1].split("</figure>")[0]
    assert chart.count('class="mark measured"') == 1
    assert chart.count('class="mark projected"') == 1
    assert chart.count('class="mark published"') == 3
    rows = [
        row
        for row in load_rows(data_root() / "results" / "published")
        if (row.model, row.hardware, row.precision, row.seq_len) == ("DeepSeek-V3", "H100", "BF16", 4096)
    ]
    of_deepseek = [row.id for row in rows if f"{row.id}: " in chart or f"{row.id} (from" in chart]
    assert len(of_deepseek) == len([row for row in rows if row.is_training and row.num_layers is None])


def test_measured_and_published_points_are_never_joined(html: str) -> None:
    for chart in re.findall(r'id="scaling-\d+".*?</figure>', html, flags=re.DOTALL):
        joins = len(re.findall(r'class="stroke join \w+"', chart))
        assert joins == chart.count("<li>") - chart.count('class="missing"')


def test_a_size_that_failed_is_a_cross_with_its_reason(html: str) -> None:
    (chart,) = [
        chart
        for chart in re.findall(r'id="scaling-\d+".*?</figure>', html, flags=re.DOTALL)
        if "no number" in chart
    ]
    assert chart.count('class="mark missing"') == chart.count('class="mark measured"') == 1
    assert "64 GPUs, no number: out of memory: CUDA out of memory." in chart
    assert ">64</text>" in chart


def test_what_is_not_there_is_named(page: Page) -> None:
    for what in ("Waterfall: where the step time goes", "Pipeline picture"):
        assert what not in page.text
    bare = dataclasses.replace(
        full_page(), records=(), training=(), projected=(), pipeline_pictures={}, waterfalls={}
    )
    text = Page(render_page(bare)).text
    for what in (
        "Measured throughput at full scale",
        "Expert load",
        "Projected throughput",
        "Pipeline picture",
        "Waterfall: where the step time goes",
    ):
        assert what in text


def test_a_page_without_training_runs_has_no_place_for_them() -> None:
    text = render_page(dataclasses.replace(full_page(), training=()))
    assert "training run" not in text
    assert 'id="training"' not in text


def test_a_page_of_nothing_says_so() -> None:
    empty = ReportData(records=(), recipes=(), rows=(), version="0")
    page = Page(render_page(empty))
    assert page.stated == {}
    assert "Weak and strong scaling no two results" in page.text


def test_names_from_records_cannot_become_markup() -> None:
    data = full_page()
    made = run(QWEN, 1.0, started_at="2026-11-20T12:00:00+00:00")
    plan = made.plan.model_copy(update={"modified": ("x=<script>alert(1)</script>",)})
    text = render_page(dataclasses.replace(data, records=(made.model_copy(update={"plan": plan}),)))
    assert "<script" not in text
    assert "&lt;script&gt;" in text


def test_a_load_beyond_the_classes_and_an_idle_expert_are_drawn(html: str) -> None:
    data = dataclasses.replace(full_page(), training=())
    lopsided = data.records[0]
    tokens = (((0, 0, 0, 100),),) * 2
    samples = lopsided.samples.model_copy(update={"tokens_per_expert": tokens})
    text = render_page(dataclasses.replace(data, records=(lopsided.model_copy(update={"samples": samples}),)))
    cells = re.findall(r"<rect class=(c\d) x=(\d+) />", text)
    assert cells == [("c0", "0"), ("c0", "1"), ("c0", "2"), ("c8", "3")]


def test_fifteen_thousand_cells_stay_below_a_megabyte() -> None:
    data = full_page()
    tokens = ((tuple(range(1, 257)),) * 58,) * 2
    large = data.records[0].samples.model_copy(update={"tokens_per_expert": tokens})
    text = render_page(
        dataclasses.replace(data, records=(data.records[0].model_copy(update={"samples": large}),))
    )
    assert Page(text).marks["experts-0"] == 256 * 58
    assert len(text.encode()) < 1_000_000


def test_the_command_writes_the_page(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_record(
        tmp_path / "results", run(DEEPSEEK, 0.5, started_at="2026-11-20T09:00:00+00:00", scale="smoke")
    )
    out = tmp_path / "report.html"
    assert main(["report", str(tmp_path / "results"), "--html", str(out), "--recipe", "qwen3_30b_a3b"]) == 0
    assert capsys.readouterr().out.strip() == str(out)
    page = Page(out.read_text(encoding="utf-8"))
    assert {"recipe-0", "recipe-1", "run-0"} <= set(page.ids)
    assert "recipe-2" not in page.ids


def test_a_training_run_gets_its_card_on_a_page_without_records(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    made, out = training_run(), tmp_path / "report.html"
    begin_run(tmp_path / "run", made.job)
    for line in made.log:
        append_line(tmp_path / "run", line)
    for window in made.health:
        append_health(tmp_path / "run", window)
    assert main(["report", str(tmp_path / "run"), "--html", str(out)]) == 0
    page = Page(out.read_text(encoding="utf-8"))
    assert {"training-0", "loss-0", "entropy-0", "training-experts-0", "recipe-0"} <= set(page.ids)
    assert not {"runs", "recipe-1"} & set(page.ids)
    assert dict(page.marks) == page.stated
    assert "got no token in 4 steps (alarm from 4)" in page.text
    # a table of benchmark results has no line for it
    capsys.readouterr()
    assert main(["report", str(tmp_path / "run")]) == 2
    assert "draw it with --html" in capsys.readouterr().err


def test_without_results_the_page_shows_the_default_run_of_every_model(tmp_path: Path) -> None:
    out = tmp_path / "report.html"
    assert main(["report", str(tmp_path), "--html", str(out)]) == 0
    page = Page(out.read_text(encoding="utf-8"))
    num_models = len(list((data_root() / "recipes").glob("*/model.yaml")))
    assert sum(name.startswith("recipe-") for name in page.ids) == num_models


@pytest.mark.parametrize(
    "arguments",
    [["--recipe", "deepseek_v3"], ["--plot", "x.png"], ["--html", "x.html", "--scaling"]],
)
def test_options_that_do_nothing_together_are_refused(arguments: list[str]) -> None:
    assert main(["report", *arguments]) == 2
