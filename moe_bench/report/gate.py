"""A comparison as a gate: equal within a band or failed, for a person, for CI, and as a step summary."""

from __future__ import annotations

import xml.etree.ElementTree as ET
from dataclasses import dataclass

from moe_bench.analysis.equivalence import Claim
from moe_bench.report.compare import Compared, Comparison, claim_text, ratio_text
from moe_bench.report.figures import rate_text


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One recipe of the baseline and what became of it."""

    name: str
    comparison: Comparison | None
    """None where the new side has no like run."""
    failure: str | None
    """None where the case passed."""


def gate_cases(compared: Compared) -> tuple[Case, ...]:
    """Every set of the baseline as a case.

    Two-sided: a case passes only if its whole interval lies within the band. Faster fails too, for then
    something changed that nobody noted, or the baseline is stale; and so does what cannot be decided.
    """
    cases = [Case(name=pair.name, comparison=pair, failure=_failure(pair)) for pair in compared.comparisons]
    cases += [
        Case(name=name, comparison=None, failure="the baseline has it, NEW has no run like it")
        for name in compared.only_base
    ]
    return tuple(cases)


def _failure(pair: Comparison) -> str | None:
    if pair.claim is Claim.SAME:
        return None
    hint = "; if it is meant, make it the new baseline" if pair.claim is Claim.FASTER else ""
    return f"{claim_text(pair)}, ratio {ratio_text(pair.interval)}{hint}"


def gate_line(cases: tuple[Case, ...], *, band_fraction: float) -> str:
    """The verdict in one line."""
    num_failed = sum(case.failure is not None for case in cases)
    band = f"within {band_fraction:.1%} of the baseline"
    if not num_failed:
        return f"gate passed: {len(cases)} of {len(cases)} {band}"
    return f"gate failed: {num_failed} of {len(cases)} not shown to be {band}"


def junit_xml(cases: tuple[Case, ...]) -> str:
    """The cases in the XML that CI systems read (JUnit's, as pytest writes it)."""
    num_failed = str(sum(case.failure is not None for case in cases))
    counts = {"tests": str(len(cases)), "failures": num_failed, "errors": "0", "skipped": "0"}
    root = ET.Element("testsuites")
    suite = ET.SubElement(root, "testsuite", {"name": "moe-bench gate", **counts})
    for case in cases:
        model, _, run = case.name.partition("/")
        element = ET.SubElement(suite, "testcase", {"classname": model, "name": run or model})
        if case.failure is not None:
            ET.SubElement(element, "failure", {"message": case.failure})
    ET.indent(root)
    return ET.tostring(root, encoding="unicode", xml_declaration=True) + "\n"


def markdown_summary(cases: tuple[Case, ...], *, band_fraction: float) -> str:
    """The cases as a Markdown table, such as GitHub shows of a step."""
    lines = [
        f"### {gate_line(cases, band_fraction=band_fraction)}",
        "",
        "| recipe | base, tokens/s/GPU | new, tokens/s/GPU | new / base | verdict |",
        "|---|--:|--:|---|---|",
    ]
    for case in cases:
        pair = case.comparison
        cells = ["-", "-", "-"]
        if pair is not None:
            sides = (pair.base, pair.new)
            cells = [rate_text(side.tokens_per_s_per_gpu) for side in sides] + [ratio_text(pair.interval)]
        verdict = "passed" if case.failure is None else f"**failed**: {case.failure}"
        lines.append(f"| `{case.name}` | {' | '.join(cells)} | {verdict} |")
    return "\n".join(lines) + "\n"
