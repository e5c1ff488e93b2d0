"""P7: resumed equals uninterrupted."""

import copy

import pytest
import torch
from opacus.schedulers import ExponentialGradClip, ExponentialNoise
from torch import optim

from psgrad import ConfigError
from psgrad.clipping import AdaptiveQuantile, Automatic, PerLayer
from psgrad.dp import PrivacyEngine, noise_generator
from tests.dp.problems import backward, dataset, flat, private

BATCHES = [dataset(24)[part : part + 6] for part in (0, 6, 12, 18)]
STYLES = {
    "flat": lambda: 0.1,
    "per layer": lambda: PerLayer({"0": 0.1, "1": 0.2, "4": 0.3}),
    "automatic": lambda: Automatic(0.1),
    "adaptive": lambda: AdaptiveQuantile(0.1, expected_batch_size=4, count_noise=0.0),
}


class Run:
    """A run that can be saved and resumed, as a script has it."""

    def __init__(self, style, sigma: float = 0.0, **options) -> None:
        self.engine = PrivacyEngine()
        self.model, self.optimizer, _ = private(
            self.engine,
            optimizer=lambda ps: optim.Adam(ps, lr=0.05),
            noise_multiplier=sigma,
            max_grad_norm=style,
            **options,
        )

    def steps(self, batches) -> "Run":
        for x, y in batches:
            backward(self.model, x, y)
            self.optimizer.step()
        return self

    def save(self, path, **more) -> None:
        self.engine.save_checkpoint(path=path, module=self.model, optimizer=self.optimizer, **more)

    def load(self, path, **more) -> "Run":
        self.engine.load_checkpoint(path=path, module=self.model, optimizer=self.optimizer, **more)
        return self


@pytest.mark.parametrize("style", STYLES.values(), ids=list(STYLES))
def test_without_noise_bit_for_bit(tmp_path, style):
    whole = Run(style()).steps(BATCHES)
    Run(style()).steps(BATCHES[:2]).save(tmp_path / "c.pt")
    resumed = Run(style()).load(tmp_path / "c.pt").steps(BATCHES[2:])
    assert torch.equal(flat(resumed.model), flat(whole.model))
    assert resumed.optimizer.max_grad_norm == whole.optimizer.max_grad_norm
    assert resumed.engine.accountant.history == whole.engine.accountant.history


@pytest.mark.parametrize("moved", [False, True])
@pytest.mark.parametrize("by", ["engine", "optimizer"])
def test_going_back_to_the_best_weights_keeps_what_was_spent_since(tmp_path, by, moved):
    run = Run(0.1, 1.5).steps(BATCHES[:1])
    run.save(tmp_path / "c.pt")
    best, state = flat(run.model), copy.deepcopy((run.model.state_dict(), run.optimizer.state_dict()))
    if moved:
        run.optimizer.noise_multiplier = 1.0
    spent = run.steps(BATCHES[1:]).engine.get_epsilon(1e-5)
    if by == "engine":
        run.load(tmp_path / "c.pt")
    else:
        run.model.load_state_dict(state[0])
        run.optimizer.load_state_dict(state[1])
    assert torch.equal(flat(run.model), best)
    assert run.engine.get_epsilon(1e-5) == spent
    run.steps(BATCHES[:1])
    assert sum(steps for *_, steps in run.engine.accountant.history) == 5


def test_two_runs_that_go_on_from_one_state_count_their_own_steps():
    state = Run(0.1, 1.5).steps(BATCHES[:1]).optimizer.state_dict()
    runs = [Run(0.1, 1.5), Run(0.1, 1.5)]
    for run in runs:
        run.optimizer.load_state_dict(state)
    for run in runs:
        run.steps(BATCHES[:1])
        assert run.engine.accountant.history == [(1.5, 0.25, 2)]


@pytest.mark.parametrize("style", [lambda: 0.1, lambda: AdaptiveQuantile(0.1, 4, count_noise=3.0)])
def test_with_noise_in_epsilon(tmp_path, style):
    whole = Run(style(), 1.5).steps(BATCHES)
    Run(style(), 1.5).steps(BATCHES[:2]).save(tmp_path / "c.pt")
    resumed = Run(style(), 1.5).load(tmp_path / "c.pt").steps(BATCHES[2:])
    assert resumed.engine.get_epsilon(1e-5) == whole.engine.get_epsilon(1e-5) > 0


def test_the_adaptive_bound_is_resumed_where_it_was(tmp_path):
    style = AdaptiveQuantile(0.1, 4, count_noise=3.0)
    first = Run(style, 1.5).steps(BATCHES)
    first.save(tmp_path / "c.pt")
    resumed = Run(style, 1.5).load(tmp_path / "c.pt")
    assert resumed.optimizer.max_grad_norm == first.optimizer.max_grad_norm != 0.1
    assert resumed.optimizer.clip.l2_bound == first.optimizer.max_grad_norm


def test_a_seeded_noise_generator_is_not_replayed(tmp_path):
    """A script that is resumed gives the same seed again; the same noise twice would cancel."""

    def noise(run: Run) -> torch.Tensor:
        before = flat(run.model)
        run.optimizer.step_empty()
        return flat(run.model) - before

    def seeded() -> Run:
        return Run(0.1, 1.0, noise_generator=noise_generator(seed=7))

    first = seeded()
    first.save(tmp_path / "c.pt")
    drawn = noise(first)
    assert torch.equal(noise(seeded()), drawn)  # what a seed is for
    again = [noise(seeded().load(tmp_path / "c.pt")) for _ in range(2)]
    assert not torch.equal(again[0], drawn)
    assert not torch.equal(again[0], again[1])


def test_the_state_of_schedulers_comes_along(tmp_path):
    first = Run(0.1, 1.0)
    schedulers = (
        ExponentialNoise(first.optimizer, gamma=0.5),
        ExponentialGradClip(first.optimizer, gamma=0.5),
    )
    for scheduler in schedulers:
        scheduler.step()
    names = ("noise_scheduler", "grad_clip_scheduler")
    first.steps(BATCHES[:1]).save(tmp_path / "c.pt", **dict(zip(names, schedulers, strict=True)))
    resumed = Run(0.1, 1.0)
    fresh = (
        ExponentialNoise(resumed.optimizer, gamma=0.5),
        ExponentialGradClip(resumed.optimizer, gamma=0.5),
    )
    resumed.load(tmp_path / "c.pt", **dict(zip(names, fresh, strict=True)))
    assert [scheduler.last_epoch for scheduler in fresh] == [scheduler.last_epoch for scheduler in schedulers]
    assert resumed.optimizer.max_grad_norm == pytest.approx(0.05)
    assert resumed.optimizer.noise_multiplier == first.optimizer.noise_multiplier == 0.5
    for optimizer, scheduler in ((first.optimizer, schedulers[0]), (resumed.optimizer, fresh[0])):
        scheduler.step()
        assert optimizer.noise_multiplier == 0.25


def test_half_a_step_before_loading_is_not_in_the_step_after(tmp_path):
    first = Run(0.1)
    first.save(tmp_path / "c.pt")
    whole = Run(0.1).steps(BATCHES[:1])
    for put_by in (False, True):
        other = Run(5.0)  # another bound, which the loaded one would not cover
        backward(other.model, *BATCHES[1])
        if put_by:
            other.optimizer.signal_skip_step()
            other.optimizer.step()
        other.load(tmp_path / "c.pt").steps(BATCHES[:1])
        assert torch.equal(flat(other.model), flat(whole.model))


def test_a_checkpoint_without_the_spent_privacy_is_refused(tmp_path):
    first = Run(0.1, 1.0).steps(BATCHES[:1])
    first.save(tmp_path / "c.pt", checkpoint_dict={"epoch": 3})
    saved = torch.load(tmp_path / "c.pt", weights_only=False)
    assert saved["epoch"] == 3
    for lost, match in (
        (lambda s: s.pop("privacy_accountant_state_dict"), "privacy_accountant"),
        (lambda s: s["optimizer_state_dict"].pop("accountant"), "accountant"),
        (lambda s: s["optimizer_state_dict"]["clip"].pop("max_norm"), "max_norm"),
    ):
        state = torch.load(tmp_path / "c.pt", weights_only=False)
        lost(state)
        torch.save(state, tmp_path / "broken.pt")
        with pytest.raises(ConfigError, match=match):
            Run(0.1, 1.0).load(tmp_path / "broken.pt")
