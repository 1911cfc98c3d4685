"""A gate passes what is shown to be equal and nothing else, in both directions."""

import xml.etree.ElementTree as ET
from pathlib import Path

import pytest

from moe_bench.cli import main
from moe_bench.report.compare import compare
from moe_bench.report.gate import gate_cases, gate_line, junit_xml, markdown_summary
from moe_bench.results.store import write_record
from moe_bench.spec.scale import Plan
from tests.report.series import runs
from tests.results.records import RECIPE, full


def other_recipe() -> Plan:
    recipe = RECIPE.model_copy(update={"seed": 1})
    return full().model_copy(update={"recipe": recipe, "asked": "other/recipe"})


def test_an_equal_speed_passes() -> None:
    cases = gate_cases(compare(runs(2.0, seed=1), runs(2.0, seed=2)))
    assert [case.failure for case in cases] == [None]
    assert gate_line(cases, band_fraction=0.05) == "gate passed: 1 of 1 within 5.0% of the baseline"


@pytest.mark.parametrize(
    ("new_s", "words"), [(4.0, "slower"), (1.0, "make it the new baseline")], ids=["slower", "faster"]
)
def test_another_speed_fails_in_both_directions(new_s: float, words: str) -> None:
    (case,) = gate_cases(compare(runs(2.0, seed=1), runs(new_s, seed=2)))
    assert case.failure is not None
    assert words in case.failure


def test_noise_does_not_pass_as_equality() -> None:
    (case,) = gate_cases(compare(runs(2.0, spread=0.1, seed=1), runs(2.0, spread=0.1, seed=2)))
    assert case.failure is not None
    assert case.failure.startswith("inconclusive: ")


def test_a_wider_band_passes_what_a_narrow_one_fails() -> None:
    base, new = list(runs(2.0, seed=1)), list(runs(2.1, seed=2))
    assert gate_cases(compare(base, new, band_fraction=0.02))[0].failure is not None
    assert gate_cases(compare(base, new, band_fraction=0.10))[0].failure is None


def test_a_recipe_that_was_not_run_again_fails() -> None:
    base = [*runs(2.0, seed=1), *runs(2.0, seed=3, plan=other_recipe())]
    cases = gate_cases(compare(base, runs(2.0, seed=2)))
    assert [case.failure is None for case in cases] == [True, False]
    assert cases[1].name == "other/recipe"


def test_junit_counts_the_failures_and_names_them() -> None:
    base = [*runs(2.0, seed=1), *runs(2.0, seed=3, plan=other_recipe())]
    root = ET.fromstring(junit_xml(gate_cases(compare(base, runs(2.0, seed=2)))))
    (suite,) = root
    assert (suite.get("tests"), suite.get("failures")) == ("2", "1")
    assert [(case.get("classname"), case.get("name")) for case in suite] == [
        ("qwen3_30b_a3b", "h100_sxm_8g_bf16"),
        ("other", "recipe"),
    ]
    failure = suite[1].find("failure")
    assert failure is not None
    assert failure.get("message") == "the baseline has it, NEW has no run like it"


def test_the_summary_is_a_markdown_table() -> None:
    cases = gate_cases(compare(runs(2.0, seed=1), runs(4.0, seed=2)))
    lines = markdown_summary(cases, band_fraction=0.05).splitlines()
    assert lines[0] == "### gate failed: 1 of 1 not shown to be within 5.0% of the baseline"
    assert {line.count("|") for line in lines[2:]} == {6}
    assert "**failed**: slower" in lines[-1]


def test_the_verb_exits_with_0_or_5_and_writes_both_files(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for folder, step_s, seed in (("base", 2.0, 1), ("same", 2.0, 2), ("slow", 4.0, 3)):
        for made in runs(step_s, seed=seed):
            write_record(tmp_path / folder, made)
    junit, summary = tmp_path / "gate.xml", tmp_path / "summary.md"
    files = ["--junit", str(junit), "--summary", str(summary)]
    assert main(["gate", str(tmp_path / "base"), str(tmp_path / "same"), *files]) == 0
    assert "gate passed" in capsys.readouterr().err
    assert main(["gate", str(tmp_path / "base"), str(tmp_path / "slow"), *files]) == 5
    assert "gate failed: 1 of 1" in capsys.readouterr().err
    assert ET.parse(junit).getroot()[0].get("failures") == "1"
    # appended, as GitHub's step summary asks for
    assert summary.read_text().count("### gate") == 2
