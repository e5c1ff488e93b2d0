"""The requirements, on cells whose numbers are known."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from psgrad.bench import conv_report
from psgrad.bench.acceptance import misses, verdict_lines
from psgrad.bench.cases import ConvCase
from psgrad.bench.gate import Verdict
from psgrad.bench.peers import PEERS, SUITES
from psgrad.bench.sweep import Cell, Setting
from psgrad.bench.timing import Measurement
from psgrad.conv.planner import DeviceRates
from psgrad.conv.strategies import STRATEGIES

SMALL = ConvCase("small", 8, 8, (4, 4), 3, padding=1)
LARGE = ConvCase("large", 512, 512, (32, 32), 3, padding=1)


def cell(case: ConvCase = SMALL, verb: str = "grads", **ratios: float) -> Cell:
    names = {name.replace("torch_func", "torch.func"): ratio for name, ratio in ratios.items()}
    return Cell(
        Setting("net", case, 8, "float32"),
        verb,
        {name: Verdict(1e-7, None, 2**20) for name in names},
        {name: Measurement((ratio,) * 3, (ratio,) * 3) for name, ratio in names.items()},
        {"auto": "loop", "measure": "unfold"},
    )


GOOD = cell(auto=1.0, loop=1.0, unfold=1.05, opacus=4.0, torch_func=2.0)
SLOW = cell(LARGE, auto=4.0, loop=4.0, unfold=2.0, opacus=2.0, torch_func=8.0)
NORMS = cell(verb="sq_norms", auto=0.5, loop=0.5, unfold=0.6, BackPACK=1.0)


def test_the_lines_are_the_numbers_of_the_cells() -> None:
    lines = {line.what.removesuffix(", geometric mean"): line for line in verdict_lines([GOOD, SLOW, NORMS])}
    found = {what: (line.found, line.holds) for what, line in lines.items()}
    assert found == {
        "grads / floor, results under 32 MB": ("1.00x (1 cases)", True),
        "grads / floor, all results": ("2.00x (2 cases)", None),
        "grads: Opacus / psgrad": ("1.41x (2 cases)", False),  # 4 and 1/2
        "grads: torch.func / psgrad": ("2.00x (2 cases)", True),
        "grads: cases slower than the best peer by more than 5 %": ("1 of 2, worst 2.00x", False),
        "sq_norms / floor, T <= 256": ("0.50x (1 cases)", False),
        "sq_norms / floor, all": ("0.50x (1 cases)", None),
        "sq_norms: cases slower than the best peer by more than 5 %": ("0 of 1", True),
        'grads: cases where "auto" is within 10% of the best strategy': ("50.0% of 2, worst 2.00x", False),
        'grads: cases where "measure" is within 3% of the best strategy': ("50.0% of 2, worst 1.05x", False),
        'sq_norms: cases where "auto" is within 10% of the best strategy': (
            "100.0% of 1, worst 1.00x",
            True,
        ),
        'sq_norms: cases where "measure" is within 3% of the best strategy': (
            "0.0% of 1, worst 1.20x",
            False,
        ),
    }


def test_a_miss_says_what_it_misses() -> None:
    assert misses(replace(GOOD, choices={"auto": "loop", "measure": "loop"})) == []
    assert misses(SLOW) == ["2.00x the time of opacus", "auto takes loop, 2.00x the time of unfold"]


def test_quotients_are_taken_round_by_round() -> None:
    measurements = {
        "auto": Measurement((1.0,) * 3, (1.0, 10.0, 4.0)),
        "opacus": Measurement((1.0,) * 2, (2.0, 20.0)),  # sat the third round out
    }
    assert replace(GOOD, measurements=measurements).quotient("opacus", "auto") == 2.0
    assert GOOD.quotient("auto", "BackPACK") is None


def test_the_roofline_is_what_arithmetic_or_memory_allows() -> None:
    arithmetic = {"float32": DeviceRates(flops=SMALL.flops(8), bytes=1e30, call=1e-6)}
    assert conv_report.roofline_share(GOOD, "opacus", arithmetic) == pytest.approx(1 / 4)
    moved = SMALL.operand_bytes(8) + SMALL.result_bytes(8)
    memory = {"float32": DeviceRates(flops=1e30, bytes=moved, call=1e-6)}
    assert conv_report.roofline_share(GOOD, "torch.func", memory) == pytest.approx(1 / 2)
    assert conv_report.roofline_share(GOOD, "BackPACK", memory) is None


def test_the_files_appear(tmp_path: Path) -> None:
    failed = replace(
        GOOD, verdicts=GOOD.verdicts | {"BackPACK": Verdict(float("nan"), "TypeError: " + 60 * "x")}
    )
    rates = {"float32": DeviceRates(flops=1e11, bytes=1e10, call=1e-6)}
    left_out = {"net huge N=256 float32": "per-sample gradients of 9000 MiB"}
    conv_report.write(
        [failed, SLOW, NORMS], tmp_path, about={"machine": "abacus"}, rates=rates, left_out=left_out
    )
    for picture in ("grads-float32.png", "sq_norms-float32.png"):
        assert (tmp_path / picture).read_bytes().startswith(b"\x89PNG")
    text = (tmp_path / "bench.md").read_text()
    assert text.index("What must be reached") < text.index("Layer by layer") < text.index("Left out (1)")
    assert "- net huge N=256 float32: per-sample gradients of 9000 MiB" in text
    assert "- net large N=8 float32, grads: 2.00x the time of opacus" in text
    record = json.loads((tmp_path / "bench.json").read_text())
    assert record["left_out"] == left_out
    first = record["cells"][0]["contenders"]
    assert first["opacus"]["ratio"] == 4.0
    assert first["BackPACK"] == {"error": None, "reason": "TypeError: " + 60 * "x", "peak_bytes": None}


def test_a_hundred_layers_are_drawn(tmp_path: Path) -> None:
    many = [cell(replace(SMALL, name=f"layer {i}"), auto=1.0, loop=1.0 + i / 50) for i in range(101)]
    conv_report.draw(many, tmp_path / "many.png", "many")
    assert (tmp_path / "many.png").stat().st_size > 50_000


def test_every_strategy_is_measured() -> None:
    assert set(SUITES["sq_norms"]) == {"auto", *STRATEGIES, *PEERS}
    assert set(SUITES["grads"]) == set(SUITES["sq_norms"]) - {"gram"}  # which makes no gradients
