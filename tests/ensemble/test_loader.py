"""What a member sees is what it would see alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader, Dataset, RandomSampler, Subset, TensorDataset

from psgrad import ConfigError, MemberError
from psgrad.ensemble import MemberLoader

N, COUNT, SEEDS = 4, 10, [3, 1, 8]


class Items(Dataset[Any]):
    """Trees of things."""

    def __len__(self) -> int:
        return COUNT

    def __getitem__(self, i: int) -> Any:
        return {"x": torch.full((2, 3), float(i)), "y": i, "name": f"item {i}"}


def tensors() -> TensorDataset:
    return TensorDataset(torch.arange(COUNT * 2.0).reshape(COUNT, 2), torch.arange(COUNT))


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("drop_last", [False, True])
@pytest.mark.parametrize("bootstrap", [False, True])
def test_every_member_sees_what_the_plain_loader_with_its_seed_gives(bootstrap, drop_last, workers) -> None:
    data = tensors()
    loader = MemberLoader(data, N, SEEDS, bootstrap=bootstrap, drop_last=drop_last, num_workers=workers)
    epochs = [list(loader) for _ in range(2)]
    assert [len(epoch) for epoch in epochs] == [len(loader)] * 2 == [2 if drop_last else 3] * 2
    for k, seed in enumerate(SEEDS):
        generator = torch.Generator().manual_seed(seed)
        own: Dataset[Any] = data
        if bootstrap:
            own = Subset(data, torch.randint(COUNT, (COUNT,), generator=generator).tolist())
        sampler = RandomSampler(own, generator=generator)
        alone = DataLoader(own, N, sampler=sampler, drop_last=drop_last)
        member = loader.member(k)
        for epoch in epochs:
            for (x, y), (x_k, y_k), (x_m, _) in zip(epoch, alone, member, strict=True):
                assert torch.equal(x[k], x_k)
                assert torch.equal(y[k], y_k)
                assert torch.equal(x_m, x_k)


def test_any_map_style_data_set_and_tree() -> None:
    loader = MemberLoader(Items(), N, SEEDS)
    batch = next(iter(loader))
    assert batch["x"].shape == (3, N, 2, 3)
    assert torch.equal(batch["x"][..., 0, 0].long(), batch["y"])
    assert batch["name"][1][2] == f"item {int(batch['y'][1, 2])}"
    first = next(iter(loader.member(1)))
    assert torch.equal(batch["x"][1], first["x"])


def test_a_bootstrap_sample_stays_the_same_and_differs_by_member() -> None:
    loader = MemberLoader(tensors(), COUNT, SEEDS, bootstrap=True)
    (_, first), (_, second) = next(iter(loader)), next(iter(loader))
    assert torch.equal(first.sort().values, second.sort().values)
    assert not torch.equal(first, second)
    assert not torch.equal(first[0].sort().values, first[1].sort().values)
    assert len(first[0].unique()) < COUNT


def test_nothing_is_drawn_from_the_global_stream() -> None:
    before = torch.get_rng_state()
    loader = MemberLoader(tensors(), N, SEEDS, bootstrap=True)
    list(loader)
    list(loader.member(0))
    assert torch.equal(torch.get_rng_state(), before)


def test_kept_members_go_on_in_the_middle_of_an_epoch() -> None:
    whole, loader = (MemberLoader(tensors(), N, SEEDS) for _ in range(2))
    batches, expected = iter(loader), [y for _ in range(2) for _, y in whole]
    assert torch.equal(next(batches)[1], expected[0])
    loader.keep([2, 0])
    found = [y for _, y in batches] + [y for _, y in loader]
    for y, all_of_them in zip(found, expected[1:], strict=True):
        assert torch.equal(y, all_of_them[[2, 0]])
    assert loader.members == 2
    assert loader.seeds == [8, 3]


def test_saved_and_loaded_it_goes_on() -> None:
    loader, other = (MemberLoader(tensors(), N, SEEDS, bootstrap=True) for _ in range(2))
    list(loader)
    state = loader.state_dict()
    expected = [y for _, y in loader]
    other.load_state_dict(state)
    assert all(torch.equal(a, b) for a, (_, b) in zip(expected, other, strict=True))
    with pytest.raises(MemberError, match="of seeds"):
        MemberLoader(tensors(), N, [1, 2, 3]).load_state_dict(state)


@pytest.mark.parametrize("size", [0, -1, 2.0, True])
def test_bad_batch_sizes_are_refused(size: Any) -> None:
    with pytest.raises(ConfigError, match="batch_size"):
        MemberLoader(tensors(), size, SEEDS)


def test_bad_data_seeds_and_members_are_refused() -> None:
    with pytest.raises(ConfigError, match="with a length and items"):
        MemberLoader(TensorDataset(torch.ones(0, 2)), N, SEEDS)
    for seeds in ([], [1, 1]):
        with pytest.raises(MemberError, match="seeds must be one a member and differ"):
            MemberLoader(tensors(), N, seeds)
    loader = MemberLoader(tensors(), N, SEEDS)
    with pytest.raises(IndexError, match="member 3 of 3"):
        loader.member(3)
    with pytest.raises(MemberError, match="keep needs"):
        loader.keep([0, 0])


def test_two_iterators_have_their_own_orders() -> None:
    loader, other = (MemberLoader(tensors(), N, SEEDS) for _ in range(2))
    expected = [[y for _, y in other] for _ in range(2)]
    for (_, first), (_, second), a, b in zip(loader, loader, *expected, strict=True):
        assert torch.equal(first, a)
        assert torch.equal(second, b)
