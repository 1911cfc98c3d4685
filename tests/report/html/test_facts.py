"""Sources lead to the page that was read, and provenance says what was not recorded."""

import pytest

from moe_bench.report.html.facts import (
    Fact,
    packages_said_once,
    recipe_facts,
    row_sources,
    run_provenance,
    source_url,
)
from moe_bench.results.published import Source, load_rows
from moe_bench.results.record import GpuFacts
from moe_bench.spec.catalogue import data_root
from moe_bench.spec.family import scaled_recipe
from tests.report.pages import recipe
from tests.results.records import record

ROWS = load_rows(data_root() / "results" / "published")


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        (
            {"repo": "a/b", "path": "docs/x.md", "commit": "067f"},
            "https://github.com/a/b/blob/067f/docs/x.md",
        ),
        (
            {"repo": "a/b", "path": "x/README.md", "commit": "tag v1"},
            "https://github.com/a/b/blob/v1/x/README.md",
        ),
        (
            {"repo": "a/b", "path": "x/y.md + z.yaml", "commit": "d4 (dev)"},
            "https://github.com/a/b/blob/d4/x/y.md",
        ),
        (
            {"repo": "a/b", "path": "skills/ (some)", "commit": "067f"},
            "https://github.com/a/b/tree/067f/skills/",
        ),
        ({"repo": "a/b", "path": "PR #57 (open), x.yaml"}, "https://github.com/a/b/issues/57"),
        ({"repo": "a/b", "path": "README.md"}, "https://github.com/a/b"),
        ({"repo": "a/b", "path": "docs / commit message", "commit": "067f"}, "https://github.com/a/b"),
        ({"paper": "Name (arXiv:2406.06563)"}, "https://arxiv.org/abs/2406.06563"),
        ({"url": "https://example.org/x", "repo": "a/b"}, "https://example.org/x"),
        ({"paper": "A technical report"}, None),
    ],
)
def test_a_source_leads_to_what_was_read(source: dict[str, str], expected: str | None) -> None:
    assert source_url(Source(**source)) == expected


def test_no_address_of_the_registry_has_a_blank_in_it() -> None:
    urls = [source_url(row.source) for row in ROWS]
    assert [url for url in urls if url is not None and (" " in url or not url.startswith("https://"))] == []
    assert sum(url is None for url in urls) < 5


def test_every_source_stands_once_with_all_its_rows() -> None:
    sources = row_sources(ROWS)
    assert len({(one.label, one.url) for one in sources}) == len(sources)
    assert sum(len(one.text.split(", ")) for one in sources) == len(ROWS)


def test_a_card_says_what_the_recipe_asks_for() -> None:
    facts = {fact.label: fact.text for fact in recipe_facts(recipe("deepseek_v3"), None)}
    assert facts["layout"] == "PP4 VPP8 EP64 DP64"
    assert facts["layers"] == "3 dense, 58 with 256 experts, 8 per token, a shared one"
    assert facts["batch"] == "512 sequences of 4,096 tokens; micro batch 1, 8 per rank"
    assert "copies row" not in facts


def test_provenance_of_gpus_names_driver_clock_and_power() -> None:
    made = record()
    gpus = tuple(
        GpuFacts(
            name="NVIDIA H100 80GB HBM3", driver_version="580.1", sm_clock_hz=clock_hz, power_limit_w=700.0
        )
        for clock_hz in (1.7e9, 1.98e9)
    )
    with_gpus = made.model_copy(update={"provenance": made.provenance.model_copy(update={"gpus": gpus})})
    facts = {fact.label: fact.text for fact in run_provenance(with_gpus)}
    assert facts["GPUs"] == "2 × NVIDIA H100 80GB HBM3"
    assert facts["SM clock"] == "1.700 to 1.980 GHz"
    assert facts["power limit"] == "700 to 700 W"
    assert facts["NCCL"] == "not recorded"
    assert {fact.label: fact.text for fact in run_provenance(made)}["GPUs"] == "none"


def test_the_card_of_a_scaled_recipe_says_where_it_comes_from() -> None:
    base = recipe("qwen3_30b_a3b/h100_sxm_16g_bf16")
    member = scaled_recipe(base, 32, strong=True, changes=("seed=1",))
    facts = {fact.label: fact.text for fact in recipe_facts(member, None)}
    assert facts["comes from"] == "qwen3_30b_a3b/h100_sxm_16g_bf16, seed=1, strong scaling"
    assert "comes from" not in {fact.label for fact in recipe_facts(base, None)}


def test_equal_packages_are_said_once_and_others_in_full() -> None:
    runs = [
        (title, (Fact(label="packages", text=text),))
        for title, text in (("a", "x 1"), ("b", "x 1"), ("c", "x 2"))
    ]
    assert [facts[0].text for facts in packages_said_once(runs)] == ["x 1", "those of a", "x 2"]
