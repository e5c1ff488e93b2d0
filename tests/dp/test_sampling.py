"""P4: what the accountant assumes of the batches is what the loader delivers."""

import itertools
import math

import pytest
import torch
from opacus.data_loader import DPDataLoader
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    IterableDataset,
    RandomSampler,
    Subset,
    SubsetRandomSampler,
    TensorDataset,
    WeightedRandomSampler,
)

from psgrad import ConfigError
from psgrad.dp import PrivacyEngine, noise_generator
from tests.dp.problems import backward, dataset, flat, in_parts, loader_of, network, private, sgd, train


def test_batches_are_poisson_samples_independent_from_step_to_step():
    count, steps = 60, 1500
    numbered = TensorDataset(torch.arange(count), torch.zeros(count))
    _, _, loader = private(loader=DataLoader(numbered, batch_size=6))
    drawn = torch.zeros(steps, count)
    for step, (x, _) in enumerate(x for _ in range(steps // 10) for x in loader):
        drawn[step, x] = 1
        assert len(x.unique()) == len(x)
    q = 0.1
    sizes = drawn.sum(1)
    # 4.9 standard deviations: one chance in a million
    assert abs(sizes.mean().item() - count * q) < 4.9 * math.sqrt(count * q * (1 - q) / steps)
    variance = count * q * (1 - q)
    assert abs(sizes.var().item() - variance) < 4.9 * variance * math.sqrt(
        2 / steps + 1 / (steps * count * q)
    )
    # a sample's being drawn tells nothing of the step after, nor of another sample in the same step
    centred = drawn - q
    spread = q * (1 - q)
    after = (centred[:-1] * centred[1:]).mean().item()
    beside = (centred[:, :-1] * centred[:, 1:]).mean().item()
    assert abs(after) < 4.9 * spread / math.sqrt(count * (steps - 1))
    assert abs(beside) < 4.9 * spread / math.sqrt((count - 1) * steps)


@pytest.mark.parametrize(("count", "batch"), [(16, 4), (10, 4), (49, 1), (98, 2), (7, 7), (5, 50), (93, 1)])
def test_steps_delivered_are_those_announced_and_accounted(count, batch):
    model, optimizer, loader = private(loader=loader_of(count, batch))
    assert len(loader) == math.ceil(count / batch)
    train(model, optimizer, loader)
    train(model, optimizer, in_parts(loader, optimizer, 2).__enter__())
    assert optimizer.accountant.history == [(1.0, 1 / len(loader), 2 * len(loader))]
    assert optimizer.expected_batch_size == count // len(loader)


@pytest.mark.parametrize("physical", [None, 2])
def test_empty_batches_are_delivered_and_are_steps(physical):
    noise = noise_generator(seed=0)  # any: a draw may be too small to change its weight
    model, optimizer, loader = private(loader=loader_of(24, 1), noise_generator=noise)
    batches = loader if physical is None else in_parts(loader, optimizer, physical).__enter__()
    empty = 0
    for x, y in batches:
        empty += len(x) == 0
        before = flat(model)
        backward(model, x, y)
        optimizer.step()
        if not len(x):
            assert x.shape == (0, 2, 5)
            assert (flat(model) != before).all()  # noise in every parameter
    assert empty >= 3
    assert optimizer.accountant.history == [(1.0, 1 / 24, 24)]


def test_the_parts_of_a_batch_make_its_step_also_with_workers_that_draw_ahead():
    whole, optimizer, loader = private(noise_multiplier=0.0, loader=loader_of(24, 8))
    train(whole, optimizer, loader)
    parts, optimizer, loader = private(noise_multiplier=0.0, loader=loader_of(24, 8, num_workers=1))
    train(parts, optimizer, in_parts(loader, optimizer, 3).__enter__())
    torch.testing.assert_close(flat(parts), flat(whole), rtol=0, atol=1e-6)
    assert optimizer.accountant.history == [(0.0, 1 / 3, 3)]


@pytest.mark.parametrize("physical", [None, 2])
def test_a_pass_that_was_broken_off_leaves_nothing_for_the_next(physical):
    """Half a logical batch, added to one of the next pass, could hold a sample twice."""
    model, optimizer, loader = private(noise_multiplier=0.0, loader=loader_of(16, 8))
    other, fresh, _ = private(noise_multiplier=0.0, loader=loader_of(16, 8))

    def batches():
        return loader if physical is None else in_parts(loader, optimizer, physical).__enter__()

    for x, y in batches():
        backward(model, x, y)
        if physical:
            optimizer.step()  # puts the part by
        break
    assert optimizer.accountant.history == []
    for x, y in batches():
        backward(model, x, y)
        optimizer.step()
        backward(other, x, y)
        fresh.signal_skip_step(not optimizer.accountant.history)
        fresh.step()
        if optimizer.accountant.history:
            break
    assert torch.equal(flat(model), flat(other))


def test_two_batches_of_the_loader_are_never_one_step():
    model, optimizer, loader = private()
    for x, y in loader:
        backward(model, x, y)
    with pytest.raises(ConfigError, match="two batches"):
        optimizer.step()
    assert optimizer.accountant.history == []
    optimizer.zero_grad()  # which is the way out
    backward(model, x, y)
    optimizer.step()


@pytest.mark.filterwarnings("error:a step of")
@pytest.mark.parametrize("drawn", ["before backward", "before the step"])
def test_one_batch_in_parts_by_hand_and_one_drawn_ahead_are_one_step_each(drawn):
    model, optimizer, loader = private()
    batches = iter(loader)
    x, y = next(batches)
    for _ in range(3):
        following = next(batches) if drawn == "before backward" else None
        for part in range(0, max(1, len(x)), 2):
            backward(model, x[part : part + 2], y[part : part + 2])
        x, y = following or next(batches)
        optimizer.step()
    assert optimizer.accountant.history == [(1.0, 0.25, 3)]


AGAIN = {
    "several steps a batch": lambda loader: ((x, y) for x, y in loader for _ in range(2)),
    "cycle": lambda loader: itertools.islice(itertools.cycle(loader), 2 * len(loader)),
    "list": lambda loader: list(loader) * 2,
    "parts": lambda loader, optimizer: list(in_parts(loader, optimizer, 2).__enter__()) * 2,
}


@pytest.mark.parametrize("batches", AGAIN.values(), ids=list(AGAIN))
def test_no_batch_has_two_steps(batches):
    """Noise of one and the same subsample; the accountant would count on another for every step."""
    model, optimizer, loader = private()
    told = (loader, optimizer)[: batches.__code__.co_argcount]
    with pytest.raises(ConfigError, match="no new batch"):
        train(model, optimizer, batches(*told))
    assert sum(steps for *_, steps in optimizer.accountant.history) <= len(loader)
    train(model, optimizer, loader)  # which is what to do


def test_a_loader_of_opacus_keeps_its_rate():
    for poisson_sampling in (True, False):
        engine = PrivacyEngine()
        theirs = DPDataLoader(dataset(16), sample_rate=0.3)
        model, optimizer, loader = private(engine, loader=theirs, poisson_sampling=poisson_sampling)
        train(model, optimizer, loader)
        assert optimizer.accountant.history == [(1.0, 0.3, 3)]
        assert engine.get_epsilon(1e-5) > 0


class Stream(IterableDataset):
    def __iter__(self):
        return iter(dataset(4))

    def __len__(self):
        return 4


DATA = dataset(16)
OTHERS = {
    "weights": (DataLoader(DATA, 4, sampler=WeightedRandomSampler([1.0] * 16, 16)), "WeightedRandomSampler"),
    "a part": (DataLoader(DATA, 4, sampler=SubsetRandomSampler([0, 1, 2, 3])), "SubsetRandomSampler"),
    "replacement": (DataLoader(DATA, 4, sampler=RandomSampler(DATA, replacement=True)), "RandomSampler"),
    "fewer": (DataLoader(DATA, 4, sampler=RandomSampler(DATA, num_samples=8)), "RandomSampler"),
    "batches of its own": (DataLoader(DATA, batch_sampler=[[0, 1], [2]]), "its own batch_sampler"),
    "no batches": (DataLoader(DATA, batch_size=None), "no batch_size"),
    "a stream": (DataLoader(Stream(), 4), "map-style"),
    "too few for one": (DataLoader(DATA, 32, drop_last=True), "no batches"),
    "batch sampler": (
        DataLoader(DATA, batch_sampler=type("Mine", (BatchSampler,), {})(range(4), 2, False)),
        "own",
    ),
}


@pytest.mark.parametrize(("loader", "match"), OTHERS.values(), ids=list(OTHERS))
def test_a_loader_that_samples_otherwise_is_refused_not_replaced(loader, match):
    with pytest.raises(ConfigError, match=match):
        private(loader=loader)


def test_a_stream_of_unknown_length_is_refused_by_name():
    unsized = DataLoader(type("Unsized", (IterableDataset,), {"__iter__": Stream.__iter__})(), 4)
    with pytest.raises(ConfigError, match=r"no known length.*expected batch size"):
        private(loader=unsized, poisson_sampling=False)
    _, optimizer, _ = private(loader=DataLoader(Stream(), 2), poisson_sampling=False)
    assert optimizer.expected_batch_size == 2
    with pytest.raises(ConfigError, match="no batches"):
        private(loader=DataLoader(DATA, 32, drop_last=True), poisson_sampling=False)


def test_a_part_of_the_data_is_a_data_set():
    model = network()
    _, _, loader = PrivacyEngine().make_private(
        module=model,
        optimizer=sgd(model.parameters()),
        data_loader=DataLoader(Subset(DATA, range(8)), batch_size=2, shuffle=True),
        noise_multiplier=1.0,
        max_grad_norm=1.0,
    )
    assert loader.batch_sampler.num_samples == 8
