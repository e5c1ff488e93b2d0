"""The step benchmark's report: numbers and reasons where they belong, the picture there."""

from __future__ import annotations

import json

import pytest

from psgrad.bench import step_report
from psgrad.bench.step import StepResult
from psgrad.bench.timing import Measurement


def timed(case, contender, *ratios, memory=None, largest=None):
    return StepResult(case, 8, contender, 1e-7, None, Measurement(ratios, ratios), memory, largest)


RESULTS = [
    timed("net", "psgrad clip", 1.0, 1.1, 1.2, memory=1.25, largest=100),
    timed("net", "psgrad norms", 1.0, 1.0, 1.0, memory=1.0),
    StepResult("net", 8, "other", 1.4, "wrong by 140.0%", None),
    timed("big", "psgrad clip", 2.2, memory=1.0, largest=7),
    timed("big", "other", 2.0, memory=4.0, largest=9),
    StepResult("big", 8, "psgrad norms", float("nan"), "Error: no | " + "x" * 200, None),
]


def cells(markdown):
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in markdown.splitlines()]


def test_the_tables():
    header, _, net, big = cells(step_report.time_table(RESULTS))
    assert header == ["model", "N", "psgrad clip", "psgrad norms", "other"]
    assert net == ["net", "8", "**1.10 (1.05-1.15)**", "1.00 (1.00-1.00)", "wrong by 140.0%"]
    assert big[2] == "2.20 (2.20-2.20)"
    assert big[3].startswith("Error: no / ")
    assert len(big[3]) <= 100
    assert big[4] == "**2.00 (2.00-2.00)**"
    assert cells(step_report.memory_table(RESULTS))[2:] == [
        ["net", "8", "**1.25**", "1.00", ""],
        ["big", "8", "**1.00**", "", "4.00"],
    ]
    header, _, *rows = cells(step_report.largest_table(RESULTS))
    assert header == ["model", "psgrad clip", "other"]
    assert rows == [["net", "100", ""], ["big", "7", "9"]]


def test_the_summary_says_over_how_many_rows():
    rows = {row[0]: row[1:] for row in cells(step_report.summary(RESULTS))[2:]}
    assert rows["psgrad clip"] == ["1.56x", "2", "1.12x", "2"]
    assert rows["other"] == ["2.00x", "1", "4.00x", "1"]
    assert rows["psgrad norms"] == ["1.00x", "1", "1.00x", "1"]


def test_the_files_appear(tmp_path):
    about = {"machine": "abacus", "memory budget": "4 GiB"}
    step_report.write(RESULTS, tmp_path / "out", title="A title", about=about)
    text = (tmp_path / "out" / "bench.md").read_text()
    for part in (step_report.time_table(RESULTS), step_report.memory_table(RESULTS), "in 4 GiB"):
        assert part in text
    assert (tmp_path / "out" / "bench.png").read_bytes().startswith(b"\x89PNG")
    record = json.loads((tmp_path / "out" / "bench.json").read_text())
    assert record["about"] == about
    assert record["results"][0]["ratio"] == pytest.approx(1.1)
    assert record["results"][0]["memory"] == 1.25
    assert record["results"][5]["error"] is None


def test_a_report_of_nothing_but_reasons(tmp_path):
    step_report.write([RESULTS[2]], tmp_path, title="A title", about={})
    assert "Peak memory" not in (tmp_path / "bench.md").read_text()
