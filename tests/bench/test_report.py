"""The report: files appear, numbers are where they belong, and a missing extra says so."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest

from psgrad.bench import machine, report
from psgrad.bench.case_sets import CASE_SETS, QUICK_CASES
from psgrad.bench.sweep import Result, geometric_means
from psgrad.bench.timing import Measurement
from psgrad.errors import ConfigError


def timed(case: str, contender: str, *ratios: float) -> Result:
    return Result(case, 8, contender, 1e-7, None, Measurement(tuple(ratios), tuple(ratios)))


RESULTS = [
    timed("first", "a", 2.0, 2.0, 2.0),
    timed("first", "b", 0.5, 1.0, 3.0),
    timed("second", "a", 8.0),
    Result("second", 8, "b", 0.25, "wrong by 25.0%", None),
    Result("third", 8, "a", float("nan"), "RuntimeError: no", None),
]


def test_the_table_has_medians_quartiles_the_best_and_the_reasons() -> None:
    lines = report.table(RESULTS).splitlines()
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    assert cells[0] == ["layer", "N", "a", "b"]
    assert cells[2] == ["first", "8", "2.00 (2.00-2.00)", "**1.00 (0.75-2.00)**"]
    assert cells[3] == ["second", "8", "**8.00 (8.00-8.00)**", "wrong by 25.0%"]
    assert cells[4] == ["third", "8", "RuntimeError: no", ""]


def test_geometric_means_leave_out_what_has_no_number() -> None:
    means = geometric_means(RESULTS)
    assert means == {"a": (pytest.approx(4.0), 2), "b": (pytest.approx(1.0), 1)}
    assert "4.00x" in report.summary(RESULTS)


def test_the_files_appear(tmp_path: Path) -> None:
    report.write(RESULTS, tmp_path / "out", title="A title", about={"machine": "abacus"})
    assert (tmp_path / "out" / "bench.png").read_bytes().startswith(b"\x89PNG")
    text = (tmp_path / "out" / "bench.md").read_text()
    assert text.startswith("# A title\n\n- machine: abacus\n")
    assert report.table(RESULTS) in text
    record = json.loads((tmp_path / "out" / "bench.json").read_text())
    assert record["about"] == {"machine": "abacus"}
    first, *_, wrong, failed = record["results"]
    assert first["ratio"] == 2.0
    assert first["measurement"]["ratios"] == [2.0, 2.0, 2.0]
    assert wrong["measurement"] is None
    assert "ratio" not in wrong
    assert wrong["error"] == 0.25
    assert failed["error"] is None


def test_a_missing_extra_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(report, "find_spec", lambda name: None)
    for write in (report.require_extra, lambda: report.table(RESULTS)):
        with pytest.raises(ConfigError, match=r'pip install "psgrad\[bench\]"'):
            write()


def test_the_machine_is_described(monkeypatch: pytest.MonkeyPatch) -> None:
    about = machine.describe()
    assert {"machine", "cpu threads", "python", "psgrad", "torch", "opacus", "commit"} <= set(about)
    assert all(isinstance(value, str) and value for value in about.values())

    def no_git(*args, **kwargs):
        raise FileNotFoundError

    monkeypatch.setattr(subprocess, "run", no_git)
    assert machine.describe()["commit"] == "unknown"


@pytest.mark.parametrize("name", CASE_SETS)
def test_the_cases_of_a_set_are_possible_and_named_apart(name: str) -> None:
    cases = CASE_SETS[name]
    assert len({case.name for case in cases}) == len(cases)
    assert set(QUICK_CASES.get(name, cases)) <= set(cases)
    for case in cases:
        assert min(case.geometry.output_size(case.input_size)) >= 1
        assert case.in_channels % case.groups == case.out_channels % case.groups == 0
