"""Per-sample gradients of single convolutions, timed: `python -m recipes.bench_conv [--quick]`.

psgrad by each strategy, Opacus, `torch.func`, ExpandedWeights and BackPACK on the layers of well-known
networks. Every contender is compared with a float64 loop first, and a wrong one gets no number. Then all are
timed in turn, round after round, against the layer's ordinary weight gradient. Ctrl-C ends the measuring and
reports what there is.
"""

from __future__ import annotations

import os
import re
import tempfile
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Annotated, Literal, get_args

import torch
from pydantic import Field
from tqdm import tqdm

from psgrad import ConfigError, keep_freed_memory
from psgrad.bench import conv_report, machine, report
from psgrad.bench.acceptance import looks_like_a_miss
from psgrad.bench.case_sets import CASE_SETS, QUICK_CASES
from psgrad.bench.cases import ConvCase
from psgrad.bench.rates import device_rates
from psgrad.bench.rules import LEAST_SPEED, RULE_CASES, measure_rule_case, slower_than_asked
from psgrad.bench.sweep import Cell, DType, Result, Setting, measure, remeasure
from psgrad.bench.tf32 import tf32
from psgrad.conv.planner import DeviceRates
from psgrad.conv.processor import Processor, processor
from recipes.config import Count, Positive, Settings, from_command_line, run_recipe
from recipes.runs import Interruptible, writable

DEFAULT = Path(__file__).parent.parent / "configs" / "bench_conv.toml"
SetName = Literal[
    "resnet18-32",
    "resnet50-224",
    "wrn-16-4",
    "vgg11-32",
    "convnext-depthwise",
    "resnext-grouped",
    "unet-transposed",
    "audio-conv1d",
    "video-conv3d",
    "tiny",
]
WRITE_EVERY = 20
"""Settings after which the report is written: what a run that is killed leaves."""
SHARE_FOR_AGAIN = 0.2
"""Of the time, for measuring again what looked like a miss."""
QUICK_MINUTES = 1.6


class BenchConv(Settings):
    """Time the ways of computing one convolution's per-sample weight gradients."""

    sets: Annotated[tuple[SetName, ...], Field(min_length=1)] = ("tiny",)
    """Networks whose layers are measured."""
    verbs: Annotated[tuple[Literal["grads", "sq_norms", "weighted_sum"], ...], Field(min_length=1)] = (
        "grads",
        "sq_norms",
        "weighted_sum",
    )
    """What is computed: per-sample gradients, their squared norms, a weighted sum of them."""
    batch_sizes: Annotated[tuple[Count, ...], Field(min_length=1)] = (1, 8, 64, 256)
    """Samples per batch, float32."""
    dtypes: Annotated[tuple[DType, ...], Field(min_length=1)] = ("float32",)
    """Of the operands; tf32 needs CUDA."""
    batch_sizes_of_other_dtypes: Annotated[tuple[Count, ...], Field(min_length=1)] = (8,)
    """Samples per batch in every dtype but float32."""
    memory_limit_mib: Count = 512
    """Settings whose operands or per-sample gradients need more are left out, and listed."""
    gflop_limit: Positive = 5.0
    """Settings whose ordinary weight gradient needs more GFLOP are left out, and listed."""
    minutes: Positive = 11.0
    """Time for everything; what a layer may take follows from it. One that has not begun then is left out."""
    rounds: Count = 15
    """Timed rounds at most; fewer when the numbers have settled or the time is used up."""
    suite: Literal["layers", "rules"] = "layers"
    """Layers of networks, or the batch rules of convolution under torch.vmap."""
    keep_freed: bool = True
    """Have the process keep memory that it frees, for all alike: `psgrad.keep_freed_memory`."""
    device: Literal["cpu", "cuda"] = "cpu"
    """Where to run."""
    quick: bool = False
    """A look in two minutes: two layers of each network, batches of 1 and 16, float32."""
    out: Path | None = None
    """Folder of the report; without one docs/results/MACHINE/bench_conv, for a quick look runs/bench_conv."""


def main(argv: list[str] | None = None) -> int:
    """Run the recipe; the exit status.

    Raises
    ------
    ConfigError
        If a dtype does not fit the device, or there is no such device, nothing can be written, or Ctrl-C came
        before the first layer was done.

    """
    begun = time.monotonic()
    settings = from_command_line(BenchConv, DEFAULT, argv)
    report.require_extra()
    machine.require_device(settings.device)
    if "tf32" in settings.dtypes and settings.device == "cpu":
        raise ConfigError("dtypes: tf32 is arithmetic of NVIDIA's tensor cores; on the CPU take float32")
    if settings.keep_freed:
        keep_freed_memory()
    # of vmap, seen in its numbers; and of modules called without their hooks
    warnings.filterwarnings("ignore", message="There is a performance drop")
    if settings.suite == "rules":
        return bench_rules(settings)

    about = {**machine.describe(settings.device), "rounds": f"up to {settings.rounds}, more where repeated"}
    out = writable(settings.out or default_folder(settings, processor(), about["machine"]))
    rates = {dtype: rates_in(dtype, settings.device) for dtype in settings.dtypes}
    for dtype, rate in rates.items():
        about[f"rates, {dtype}"] = (
            f"{rate.flops / 1e9:.0f} GFLOP/s, {rate.bytes / 1e9:.1f} GB/s, {1e6 * rate.call:.1f} us a call"
        )
    todo, left_out = select(settings)
    end = begun + 60 * (QUICK_MINUTES if settings.quick else settings.minutes)
    again_from = end - SHARE_FOR_AGAIN * (end - time.monotonic())
    cells: list[Cell] = []

    def write(note: str = "") -> None:
        about["taken"] = f"{(time.monotonic() - begun) / 60:.1f} minutes{note}"
        conv_report.write(in_order(cells, settings), out, about=about, rates=rates, left_out=left_out)

    with fresh_choices(), Interruptible() as interrupt:
        with tqdm(todo, desc="bench", unit="layer") as bar:
            for i, setting in enumerate(bar):
                bar.set_postfix_str(str(setting))
                left = again_from - time.monotonic()
                if left <= 0:
                    left_out[str(setting)] = "the time was used up"
                    continue
                # half for the check before the timing, and for the first calls
                seconds = 0.5 * left / (len(todo) - i) / len(settings.verbs)
                cells += measure(
                    setting,
                    settings.verbs,
                    seconds=seconds,
                    memory_limit=settings.memory_limit_mib * 2**20,
                    rounds=settings.rounds,
                    device=settings.device,
                    stop=lambda: interrupt.asked,
                )
                if interrupt.asked:
                    break
                if (i + 1) % WRITE_EVERY == 0:
                    write(", not all was measured yet")
        cells = measure_again(cells, end, settings.device, interrupt)
    if interrupt.asked:
        print("interrupted; this is what was measured")
    if not cells:
        raise ConfigError("nothing was measured")
    write(", interrupted" if interrupt.asked else "")
    print(conv_report.acceptance_table(cells))
    print(f"\n{len(cells)} cases, {len(left_out)} settings left out; written to {out}")
    return 0


def select(settings: BenchConv) -> tuple[list[Setting], dict[str, str]]:
    """Return what is to be measured, each layer once, and what is left out with the reason.

    The cheap come first: when the time is used up, the dearest are left out, whatever their network.
    """
    sets = {name: CASE_SETS[name] for name in settings.sets}
    if settings.quick:
        sets = {name: QUICK_CASES.get(name, cases) for name, cases in sets.items()}
    network: dict[ConvCase, SetName] = {}
    for name, cases in sets.items():
        for case in cases:
            network.setdefault(case, name)
    todo, left_out = [], {}
    for dtype in ("float32",) if settings.quick else settings.dtypes:
        others = settings.batch_sizes_of_other_dtypes
        sizes = settings.batch_sizes if dtype == "float32" else others
        for case, name in network.items():
            for n in (1, 16) if settings.quick else sizes:
                setting = Setting(name, case, n, dtype)
                reason = too_large(setting, settings)
                if reason is None:
                    todo.append(setting)
                else:
                    left_out[str(setting)] = reason
    return sorted(todo, key=cheapness), left_out


def cheapness(setting: Setting) -> float:
    """Return about the seconds of an ordinary gradient and a look at its result, for sorting only."""
    case, n = setting.case, setting.batch_size
    return case.flops(n) / 1e11 + case.result_bytes(n) / 1e10


def in_order(cells: list[Cell], settings: BenchConv) -> list[Cell]:
    """Return the cells by dtype, network, layer and batch size, as the tables have them."""
    layers = list(dict.fromkeys(case for name in settings.sets for case in CASE_SETS[name]))
    dtypes = get_args(DType)
    return sorted(
        cells,
        key=lambda cell: (
            settings.verbs.index(cell.verb),
            dtypes.index(cell.setting.dtype),
            layers.index(cell.setting.case),
            cell.setting.batch_size,
        ),
    )


def too_large(setting: Setting, settings: BenchConv) -> str | None:
    """Why a setting is left out, or None."""
    case, n, limit = setting.case, setting.batch_size, settings.memory_limit_mib * 2**20
    result, operands = case.result_bytes(n, setting.itemsize), case.operand_bytes(n, setting.itemsize)
    if result > limit:
        return f"per-sample gradients of {result / 2**20:.0f} MiB"
    if operands > limit:
        return f"operands of {operands / 2**20:.0f} MiB"
    if case.flops(n) > 1e9 * settings.gflop_limit:
        return f"{case.flops(n) / 1e9:.1f} GFLOP"
    return None


def measure_again(cells: list[Cell], end: float, device: str, interrupt: Interruptible) -> list[Cell]:
    """Return the cells, those that looked like a miss measured longer while time is left."""
    suspects = [i for i, cell in enumerate(cells) if looks_like_a_miss(cell)]
    cells = list(cells)
    for done, i in enumerate(tqdm(suspects, desc="again", unit="case")):
        left = end - time.monotonic()
        if interrupt.asked or left <= 0:
            break
        seconds = min(10.0, max(0.3, left / (len(suspects) - done)))
        cells[i] = remeasure(cells[i], seconds=seconds, device=device, stop=lambda: interrupt.asked)
    return cells


def rates_in(dtype: DType, device: str) -> DeviceRates:
    """Rates of the device in a dtype."""
    with tf32(dtype == "tf32"):
        return device_rates(device, torch.bfloat16 if dtype == "bfloat16" else torch.float32)


@contextmanager
def fresh_choices() -> Iterator[None]:
    """While entered, "measure" knows nothing from earlier runs, and leaves nothing to later ones."""
    before = os.environ.get("PSGRAD_CACHE")
    with tempfile.TemporaryDirectory() as folder:
        os.environ["PSGRAD_CACHE"] = folder
        try:
            yield
        finally:
            if before is None:
                del os.environ["PSGRAD_CACHE"]
            else:
                os.environ["PSGRAD_CACHE"] = before


def default_folder(settings: BenchConv, cpu: Processor, machine: str) -> Path:
    """Return where a report goes that was not told where; each CPU family has its own."""
    if settings.quick:
        return Path("runs/bench_conv")
    noise = {"r", "tm", "intel", "amd", "processor", "cpu"}
    words = [word for word in re.findall(r"[a-z0-9]+", machine.lower()) if word not in noise]
    if settings.device == "cpu":
        family = re.search(r"cpu family (\d+)", cpu.version)
        words += [f"family{family[1]}"] if family else []
        words += [cpu.instructions.lower(), str(os.cpu_count()), "cores"]
    return Path("docs/results") / "-".join(words) / "bench_conv"


def bench_rules(settings: BenchConv) -> int:
    """Measure the batch rules; the exit status.

    Raises
    ------
    ConfigError
        If nothing can be written, or Ctrl-C came before the first case was done.

    """
    results: list[Result] = []
    out = writable(settings.out or Path("runs/bench_conv_rules"))
    with tqdm(RULE_CASES, desc="bench", unit="case") as bar, Interruptible() as interrupt:
        for case in bar:
            bar.set_postfix_str(case.name)
            timed = partial(measure_rule_case, case, device=settings.device, stop=lambda: interrupt.asked)
            found = timed(rounds=settings.rounds)
            if slower_than_asked(found):  # or so it looks: longer, to know
                found = timed(rounds=5 * settings.rounds) or found
            results += found
            if interrupt.asked:
                break
    if not results:
        raise ConfigError("nothing was measured")
    slower = slower_than_asked(results)
    about = {
        **machine.describe(settings.device),
        "rounds": f"{settings.rounds}, and {5 * settings.rounds} where psgrad looked slower than asked",
        f"psgrad at {LEAST_SPEED}x the speed of PyTorch's own rules or faster": (
            f"{len({r.case for r in results}) - len(slower)} of {len({r.case for r in results})} cases"
        ),
    }
    title, floor = "Batch rules of convolution under torch.vmap", "same call on PyTorch's own rules"
    report.write(results, out, title=title, about=about, floor=floor)
    print(report.table(results))
    print(f"\n{report.summary(results)}\n\nwritten to {out}")
    return 0


if __name__ == "__main__":
    run_recipe(main)
