"""What tells graphs apart is looked at in every step, and has to cost little."""

from __future__ import annotations

import sys
from dataclasses import dataclass, field

from torch import Tensor, nn

from psgrad.ensemble import Ensemble
from psgrad.ensemble.trace import settings_key, trace_key


@dataclass
class Config:
    """As models have one."""

    width: int = 8
    activation: str = "gelu"
    scales: list[float] = field(default_factory=lambda: [1.0, 2.0])


class Block(nn.Module):
    """Holds the model's config, as its own setting."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config, self.heads = config, 2
        self.first, self.norm, self.second = nn.Linear(8, 8), nn.LayerNorm(8), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.config.scales[0] * self.second(self.first(self.norm(x)))


def build() -> nn.Module:
    config = Config()
    return nn.Sequential(*[Block(config) for _ in range(12)])


def test_a_key_takes_few_python_calls_a_module_and_sees_what_changes() -> None:
    stacked = Ensemble.from_factory(build, range(2)).stacked
    calls = 0

    def count(_: object, event: str, __: object) -> None:
        nonlocal calls
        calls += event == "call"

    sys.setprofile(count)
    try:
        before = trace_key(stacked), settings_key(stacked)
    finally:
        sys.setprofile(None)
    assert calls < 5 * len(list(stacked.modules()))
    stacked[7].config.scales[0] = 3.0
    assert settings_key(stacked) != before[1]
    assert trace_key(stacked) == before[0]
    stacked[7].eval()
    assert trace_key(stacked) != before[0]
