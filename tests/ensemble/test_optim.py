"""One stacked step is K steps of torch.optim, each member as if it were alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.optim.lr_scheduler import (
    CosineAnnealingLR,
    ExponentialLR,
    LambdaLR,
    OneCycleLR,
    ReduceLROnPlateau,
    SequentialLR,
    StepLR,
)

from psgrad import ConfigError, MemberError
from psgrad.ensemble import SGD, Adam, AdamW, PerMember

K, STEPS = 3, 100
SHAPES = ((4, 2, 3), (5,), ())
LR = [0.05, 0.01, 0.02]
DECAY = [0.1, 0.0, 0.01]
THEIRS: dict[type, type[torch.optim.Optimizer]] = {
    SGD: torch.optim.SGD,
    Adam: torch.optim.Adam,
    AdamW: torch.optim.AdamW,
}
CASES: list[tuple[type, dict[str, Any]]] = [
    (SGD, {"lr": 0.05}),
    (SGD, {"lr": LR}),
    (SGD, {"lr": 0.05, "momentum": 0.9, "weight_decay": 0.1, "nesterov": True}),
    (SGD, {"lr": LR, "momentum": [0.9, 0.5, 0.8], "weight_decay": DECAY, "nesterov": True}),
    (SGD, {"lr": LR, "momentum": [0.9, 0.0, 0.5], "weight_decay": DECAY, "dampening": 0.3}),
    (Adam, {"lr": 0.05, "weight_decay": 0.1, "amsgrad": True}),
    (Adam, {"lr": LR, "betas": ([0.9, 0.8, 0.0], [0.99, 0.9, 0.95]), "weight_decay": DECAY}),
    (AdamW, {"lr": 0.05, "betas": (0.9, 0.99)}),
    (AdamW, {"lr": LR, "betas": (0.9, [0.99, 0.9, 0.95]), "weight_decay": DECAY, "amsgrad": True}),
]
SCHEDULES: dict[str, Callable[[torch.optim.Optimizer], Any]] = {
    "none": lambda o: None,
    "step": lambda o: StepLR(o, 7, gamma=0.9),
    "cosine": lambda o: CosineAnnealingLR(o, STEPS, eta_min=1e-3),
    "lambda": lambda o: LambdaLR(o, lambda t: 1 / (1 + 0.1 * t)),
}


def start(dtype: torch.dtype = torch.float64) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(K, *shape, generator=generator, dtype=dtype).requires_grad_() for shape in SHAPES]


def gradient(p: Tensor, target: float, step: int) -> Tensor:
    """Elementwise, and different at every step."""
    return (p.detach() - target) * (1 + 0.5 * torch.sin(torch.tensor(float(step))))


def fit(
    parameters: list[Tensor], optimizer: torch.optim.Optimizer, schedule: Any = None, steps=STEPS
) -> None:
    for step in range(steps):
        for i, p in enumerate(parameters):
            p.grad = gradient(p, 0.3 * i, step)
        optimizer.step()
        if schedule is not None:
            schedule.step()


def of_member(options: dict[str, Any], k: int) -> dict[str, Any]:
    def pick(value: Any) -> Any:
        if isinstance(value, tuple):
            return tuple(map(pick, value))
        return value[k] if isinstance(value, list) else value

    return {name: pick(value) for name, value in options.items()}


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize(("ours", "options"), CASES)
def test_every_member_is_torch_optim_alone(ours: type, options: dict[str, Any], schedule: str) -> None:
    stacked = start()
    optimizer = ours(stacked, **options)
    fit(stacked, optimizer, SCHEDULES[schedule](optimizer))
    for k in range(K):
        alone = [p.detach()[k].clone().requires_grad_() for p in start()]
        their = THEIRS[ours](alone, **of_member(options, k))
        fit(alone, their, SCHEDULES[schedule](their))
        for p, expected in zip(stacked, alone, strict=True):
            torch.testing.assert_close(p[k], expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(
    "schedule",
    [
        lambda o: OneCycleLR(o, max_lr=0.1, total_steps=STEPS + 1),
        lambda o: SequentialLR(o, [StepLR(o, 3), ExponentialLR(o, 0.95)], [10]),
    ],
    ids=["one cycle", "sequential"],
)
@pytest.mark.parametrize(("ours", "options"), [CASES[3], CASES[6]])
def test_schedules_that_set_rates_and_momentum(ours, options, schedule) -> None:
    stacked = start()
    optimizer = ours(stacked, **options)
    fit(stacked, optimizer, schedule(optimizer))
    alone = [p.detach()[1].clone().requires_grad_() for p in start()]
    their = THEIRS[ours](alone, **of_member(options, 1))
    fit(alone, their, schedule(their))
    for p, expected in zip(stacked, alone, strict=True):
        torch.testing.assert_close(p[1], expected, rtol=1e-10, atol=1e-12)


def test_a_schedule_of_ones_own_for_every_member() -> None:
    stacked = start()
    optimizer = SGD(stacked, lr=LR)
    schedule = LambdaLR(optimizer, lambda t: PerMember([1.0, 0.5**t, 1 / (1 + t)]))
    fit(stacked, optimizer, schedule, 1)
    assert optimizer.param_groups[0]["lr"] == PerMember([0.05, 0.005, 0.01])
    fit(stacked, optimizer, schedule, 3)


def test_a_schedule_that_needs_one_number_says_so() -> None:
    schedule = ReduceLROnPlateau(SGD(start(), lr=LR), patience=0)
    schedule.step(1.0)
    with pytest.raises(TypeError, match="is no single number"):
        schedule.step(1.0)


@pytest.mark.parametrize("what", ["nan", "infinite", "rate", "start"])
@pytest.mark.parametrize(("ours", "options"), CASES)
def test_another_member_changes_nothing_bitwise(ours: type, options: dict[str, Any], what: str) -> None:
    def run(changed: bool) -> list[Tensor]:
        stacked, own = start(torch.float32), dict(options)
        with torch.no_grad():
            if changed and what == "start":
                stacked[0][1] = 1e3
            elif changed and what in ("nan", "infinite"):
                stacked[0][1] = float("nan" if what == "nan" else "inf")
        own["lr"] = [0.05, 0.7 if changed and what == "rate" else 0.01, 0.02]
        fit(stacked, ours(stacked, **own), steps=10)
        return [p.detach() for p in stacked]

    for before, after in zip(run(False), run(True), strict=True):
        assert torch.equal(before[[0, 2]], after[[0, 2]])


@pytest.mark.parametrize(("ours", "options"), CASES)
def test_frozen_and_unused_parameters_stay_and_join_later(ours: type, options: dict[str, Any]) -> None:
    stacked = start()
    frozen = torch.ones(K, 2, dtype=torch.float64)
    optimizer = ours([*stacked, frozen], **options)
    for step in range(6):
        for i, p in enumerate(stacked):
            p.grad = None if i == 1 and step < 3 else gradient(p, 0.0, step)
        optimizer.step()
    assert torch.equal(frozen, torch.ones(K, 2, dtype=torch.float64))
    alone = [p.detach()[2].clone().requires_grad_() for p in start()]
    their = THEIRS[ours](alone, **of_member(options, 2))
    for step in range(6):
        for i, p in enumerate(alone):
            p.grad = None if i == 1 and step < 3 else gradient(p, 0.0, step)
        their.step()
    for p, expected in zip(stacked, alone, strict=True):
        torch.testing.assert_close(p[2], expected, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("where", ["gradient", "parameter", "parameter, later", "state"])
@pytest.mark.parametrize(("ours", "options"), [CASES[2], CASES[5], CASES[7]])
def test_tensors_in_any_layout(ours: type, options: dict[str, Any], where: str) -> None:
    """Fused kernels read memory from its start on, whatever the strides are."""
    stacked = [torch.randn(4, 5, K, dtype=torch.float64).movedim(-1, 0)]  # [K, 4, 5], K innermost
    if where != "parameter":
        stacked = [p.contiguous() for p in stacked]
    stacked = [p.requires_grad_() for p in stacked]
    alone = [p.detach().clone().contiguous().requires_grad_() for p in stacked]
    optimizers = ours(stacked, **options), THEIRS[ours](alone, **options)
    for step in range(4):
        for p, q in zip(stacked, alone, strict=True):
            q.grad = gradient(q, 0.1, step).contiguous()
            p.grad = q.grad.clone()
            if where == "gradient":
                p.grad = p.grad.movedim(0, -1).contiguous().movedim(-1, 0)
            if where == "parameter, later" and step == 2:
                p.data = p.data.movedim(0, -1).contiguous().movedim(-1, 0)
        for optimizer in optimizers:
            optimizer.step()
        for name, value in optimizers[0].state[stacked[0]].items():
            if where == "state" and value.ndim:
                optimizers[0].state[stacked[0]][name] = value.movedim(0, -1).contiguous().movedim(-1, 0)
        for p, q in zip(stacked, alone, strict=True):
            torch.testing.assert_close(p, q, rtol=1e-12, atol=1e-14)


def test_hooks_of_a_step_are_called_and_a_profiler_sees_it() -> None:
    p = torch.ones(K, 2, requires_grad=True)
    optimizer, called = SGD([p], lr=0.1), []
    optimizer.register_step_pre_hook(lambda *_: called.append("before"))
    optimizer.register_step_post_hook(lambda *_: called.append("after"))
    p.grad = torch.ones(K, 2)
    optimizer.step()
    assert called == ["before", "after"]
    other = SGD([p], lr=0.1)
    with torch.profiler.profile() as profile:
        other.step()
    assert "Optimizer.step#SGD.step" in {event.key for event in profile.key_averages()}


def test_groups_with_rates_of_their_own() -> None:
    stacked = start()
    optimizer = SGD([{"params": stacked[:1], "lr": LR}, {"params": stacked[1:]}], lr=0.5, momentum=0.9)
    fit(stacked, optimizer, steps=5)
    alone = [p.detach()[1].clone().requires_grad_() for p in start()]
    groups = [{"params": alone[:1], "lr": LR[1]}, {"params": alone[1:]}]
    fit(alone, torch.optim.SGD(groups, lr=0.5, momentum=0.9), steps=5)
    for p, expected in zip(stacked, alone, strict=True):
        torch.testing.assert_close(p[1], expected, rtol=1e-12, atol=1e-14)


def test_the_closure_is_called_with_gradients_on() -> None:
    p = torch.ones(K, 2, requires_grad=True)
    optimizer = SGD([p], lr=0.1)

    def closure() -> Tensor:
        loss = p.sum()
        loss.backward()
        return loss

    assert optimizer.step(closure) == 6
    torch.testing.assert_close(p.detach(), torch.full((K, 2), 0.9))


@pytest.mark.parametrize("ours", [SGD, Adam, AdamW])
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lr": -0.1}, r"lr must be in \[0, inf\), got -0.1"),
        ({"lr": float("nan")}, "lr must be in"),
        ({"lr": [0.1, 0.2]}, "lr has 2 values, the optimizer 3 members"),
        ({"lr": [0.1, 0.2, -1]}, "lr must be in"),
        ({"lr": "fast"}, "lr must be a number or one a member, got 'fast'"),
        ({"lr": torch.ones(3, 1)}, "one real number a member"),
        ({"lr": 0.1, "weight_decay": -1}, "weight_decay must be in"),
    ],
)
def test_bad_settings_are_refused(ours: type, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        ours(start(), **options)


@pytest.mark.parametrize("betas", [0.9, (0.9,), (0.9, 1.0), (-0.1, 0.9), (0.9, [0.9, 0.9])])
def test_bad_betas_are_refused(betas: Any) -> None:
    with pytest.raises(ConfigError, match="betas"):
        Adam(start(), betas=betas)


def test_more_bad_settings_are_refused() -> None:
    with pytest.raises(ConfigError, match="eps must not be negative"):
        AdamW(start(), eps=-1.0)
    with pytest.raises(ConfigError, match="nesterov needs momentum in every member"):
        SGD(start(), momentum=[0.9, 0.0, 0.9], nesterov=True)
    with pytest.raises(ConfigError, match="nesterov"):
        SGD(start(), momentum=0.9, dampening=0.1, nesterov=True)


def test_what_is_set_later_is_checked_at_the_step() -> None:
    stacked = start()
    optimizer = SGD(stacked, lr=0.1)
    optimizer.param_groups[0]["lr"] = [0.1, 0.2]
    stacked[0].grad = torch.ones_like(stacked[0])
    with pytest.raises(ConfigError, match="lr has 2 values"):
        optimizer.step()


@pytest.mark.parametrize(
    "parameters",
    [
        [torch.ones(3, 2), torch.ones(2, 2)],
        [torch.tensor(1.0)],
        [torch.ones(3), torch.tensor(1.0)],
        [torch.ones(3, dtype=torch.complex64)],
    ],
)
def test_parameters_of_no_ensemble_are_refused(parameters: list[Tensor]) -> None:
    with pytest.raises(MemberError, match=r"real and \[K, \.\.\.\]"):
        SGD(parameters, lr=0.1)


def test_a_refused_group_leaves_the_optimizer_as_it_was() -> None:
    optimizer = SGD(start(), lr=0.1)
    with pytest.raises(MemberError):
        optimizer.add_param_group({"params": [torch.ones(4, 2)]})
    with pytest.raises(MemberError, match="without parameters"):
        optimizer.add_param_group({"params": []})
    assert len(optimizer.param_groups) == 1


def test_a_sparse_gradient_is_refused() -> None:
    p = torch.ones(K, 2, requires_grad=True)
    p.grad = torch.ones(K, 2).to_sparse()
    with pytest.raises(ConfigError, match="sparse"):
        SGD([p], lr=0.1).step()
