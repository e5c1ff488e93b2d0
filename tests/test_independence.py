"""The generic check: what it finds, where it points, and that it leaves nothing behind."""

import copy

import pytest
import torch
from torch import nn

from psgrad import (
    ConfigError,
    PerSampleGrads,
    RefusedModelError,
    ShapeError,
    check_rows_independent,
    independence,
)
from psgrad.watch import Watched


class BatchMean(nn.Module):
    """A custom normalisation that no list of types knows."""

    def forward(self, x):
        return x - x.mean(0)


class MeanThenChild(nn.Module):
    """Mixes in its own forward, then calls a child that is not to blame."""

    def __init__(self):
        super().__init__()
        self.child = nn.Linear(3, 3)

    def forward(self, x):
        return self.child(x + x.mean(0, keepdim=True))


class Rolled(nn.Module):
    """Each sample sees only its successor."""

    def forward(self, x):
        return x + x.roll(-1, 0)


class FirstToAll(nn.Module):
    """Every sample sees the first, which sees itself alone."""

    def forward(self, x):
        return x + x[:1]


class InPlaceMean(nn.Module):
    def forward(self, x):
        return x.sub_(x.mean(0))


class RandomPairs(nn.Module):
    """Mixup: the partner is drawn."""

    def forward(self, x):
        return 0.9 * x + 0.1 * x.roll(int(torch.randint(1, len(x), ())), 0)


class RememberedMax(nn.Module):
    """Returns every sample untouched and keeps something of the batch."""

    def __init__(self):
        super().__init__()
        self.register_buffer("largest", torch.zeros(()))

    def forward(self, x):
        self.largest = torch.maximum(self.largest, x.max())
        return x


class SequenceFirst(nn.Module):
    """Batch first outside, sequence first inside."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(3, 3)

    def forward(self, x):
        return self.linear(x.transpose(0, 1)).transpose(0, 1)


@pytest.mark.parametrize("samples", [2, 3, 4, 7])
@pytest.mark.parametrize(
    ("module", "path"),
    [
        (nn.Sequential(nn.Linear(3, 3), BatchMean(), nn.Linear(3, 3)), r"^1 \(BatchMean\)"),
        (nn.Sequential(nn.Linear(3, 3), MeanThenChild()), r"^1 \(MeanThenChild\)"),
        (nn.Sequential(nn.Sequential(nn.Tanh(), Rolled()), nn.Linear(3, 3)), r"^0\.1 \(Rolled\)"),
        (nn.Sequential(nn.Linear(3, 3), FirstToAll()), r"^1 \(FirstToAll\)"),
        (nn.Sequential(nn.Linear(3, 3), InPlaceMean()), r"^1 \(InPlaceMean\)"),
        (nn.Sequential(RandomPairs(), nn.Linear(3, 3)), r"^0 \(RandomPairs\)"),
        (nn.Sequential(nn.Linear(3, 3), RememberedMax()), r"^1 \(RememberedMax\).*buffers"),
        (nn.Sequential(nn.BatchNorm1d(3), nn.BatchNorm1d(3)), r"^0 \(BatchNorm1d\).*GroupNorm"),
        (BatchMean(), r"^the model itself \(BatchMean\)"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else "",
)
def test_the_first_module_that_mixes_is_named(module, path, samples):
    with pytest.raises(RefusedModelError, match=path):
        check_rows_independent(module, torch.randn(samples, 3))


def test_nothing_hides_behind_a_head_of_zeros():
    model = nn.Sequential(BatchMean(), nn.Linear(3, 2))
    nn.init.zeros_(model[1].weight)
    with pytest.raises(RefusedModelError, match=r"0 \(BatchMean\)"):
        check_rows_independent(model, torch.randn(4, 3))


def test_a_weak_mixture_is_found():
    class Weak(nn.Module):
        def forward(self, x):
            return x + 1e-4 * x.sum()

    with pytest.raises(RefusedModelError, match="Weak"):
        check_rows_independent(Weak(), torch.randn(4, 3))


@pytest.mark.parametrize("shape", [(4, 3, 3), (4, 4, 3), (2, 5, 3)])
def test_the_batch_may_lie_in_another_axis_inside(shape):
    check_rows_independent(SequenceFirst(), torch.randn(shape))


def test_rows_by_turns_are_no_mixture_inside():
    class StepsFirst(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(3, 3)

        def forward(self, x):
            steps = self.linear(x.transpose(0, 1).flatten(0, 1))
            return steps.unflatten(0, (-1, len(x))).transpose(0, 1)

    check_rows_independent(StepsFirst(), torch.randn(4, 5, 3))


def test_rows_of_one_sample_may_mix():
    class PairMean(nn.Module):
        def forward(self, x):
            return (x.unflatten(0, (-1, 2)) + x.unflatten(0, (-1, 2)).mean(1, keepdim=True)).flatten(0, 1)

    check_rows_independent(PairMean(), torch.randn(6, 3), rows_per_sample=2)
    with pytest.raises(RefusedModelError, match="PairMean"):
        check_rows_independent(PairMean(), torch.randn(6, 3))
    with pytest.raises(RefusedModelError, match="BatchMean"):
        check_rows_independent(BatchMean(), torch.randn(6, 3), rows_per_sample=2)


def test_words_and_shared_inputs():
    class Bag(nn.Module):
        def __init__(self):
            super().__init__()
            self.embedding = nn.Embedding(7, 3)

        def forward(self, words, weights):
            return (self.embedding(words["ids"]) * weights[:, None]).sum(1)

    check_rows_independent(Bag(), {"ids": torch.randint(7, (4, 5))}, torch.rand(5))
    with pytest.raises(ConfigError, match="alike"):
        check_rows_independent(Bag(), {"ids": torch.ones(4, 5, dtype=torch.long)}, torch.rand(5))


def test_masks_and_tensors_of_no_element():
    class Masked(nn.Module):
        def forward(self, x, mask, nothing):
            return x.masked_fill(mask, 0.0), torch.cat([nothing, x[:, :0]], 1)

    x = torch.randn(4, 3)
    check_rows_independent(Masked(), x, x > 0, x[:, :0])


@pytest.mark.parametrize(
    "values", [torch.rand(50) + 2, torch.full((5,), 3.0), torch.arange(2, 9), torch.tensor([True, False])]
)
def test_what_samples_are_exchanged_for_differs_everywhere_within_the_same_range(values):
    torch.manual_seed(0)
    other = independence._other_values(values)
    assert (other != values).all()
    top = values.max() + (values.min() == values.max())
    assert (other >= values.min()).all()
    assert (other <= top).all()


def test_what_moves_no_more_than_from_pass_to_pass_is_no_mixture():
    nobody, first = torch.tensor([False, False]), torch.tensor([True, False])
    for moved, apart in ((4e-6, True), (9e-6, False)):
        seen = Watched(torch.zeros(2))
        seen.compare(torch.tensor([0.0, 1e-6]), nobody)
        seen.compare(torch.tensor([1.0, moved]), first)
        assert seen.apart is apart
    seen = Watched(torch.tensor([1.0, torch.nan]))
    seen.compare(seen.value, nobody)
    seen.compare(torch.tensor([2.0, torch.nan]), first)
    assert seen.apart
    seen.compare(torch.tensor([2.0, 1.0]), first)
    assert not seen.apart


def test_everything_is_given_back():
    torch.manual_seed(1)
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.Dropout(), nn.BatchNorm2d(4), nn.Dropout().eval(), RememberedMax()
    )
    model.add_module("renormalised", nn.Sequential(nn.Flatten(), nn.Linear(16, 2)))
    nn.utils.parametrizations.spectral_norm(model.renormalised[1])  # its buffers move in every pass
    before, random_state = copy.deepcopy(model), torch.get_rng_state()
    largest = model[4].largest
    with pytest.raises(RefusedModelError, match="BatchNorm2d"):
        check_rows_independent(model, torch.randn(3, 3, 4, 4, generator=torch.Generator().manual_seed(0)))
    assert torch.equal(torch.get_rng_state(), random_state)
    assert model[4].largest is largest
    assert [m.training for m in model.modules()] == [m.training for m in before.modules()]
    for (name, now), then in zip(model.state_dict().items(), before.state_dict().values(), strict=True):
        torch.testing.assert_close(now, then, rtol=0, atol=0, msg=name)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_a_module_that_fails_is_given_back_too():
    class Fails(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = nn.BatchNorm1d(3)

        def forward(self, x):
            self.norm(x)
            raise ZeroDivisionError

    model = Fails()
    with pytest.raises(ZeroDivisionError):
        check_rows_independent(model, torch.randn(4, 3))
    assert model.norm.num_batches_tracked == 0
    assert not model.norm._forward_hooks


def test_it_runs_beside_a_handle():
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 2))
    with PerSampleGrads(model):
        check_rows_independent(model, torch.randn(4, 3))


def test_random_numbers_that_torch_does_not_seed_are_no_verdict():
    class Unseeded(nn.Module):
        def forward(self, x):
            return x * torch.randn(3, generator=generator)

    generator = torch.Generator().manual_seed(0)
    with pytest.raises(ConfigError, match=r"0 \(Unseeded\).*same seed differ"):
        check_rows_independent(nn.Sequential(Unseeded()), torch.randn(4, 3))


@pytest.mark.parametrize(("rows", "per_sample"), [(1, 1), (0, 1), (3, 2), (2, 2), (4, 0)])
def test_fewer_than_two_samples_are_no_check(rows, per_sample):
    with pytest.raises(ShapeError, match=f"{rows} rows"):
        check_rows_independent(nn.Linear(3, 3), torch.randn(rows, 3), rows_per_sample=per_sample)


def test_a_lazy_module_must_have_run():
    with pytest.raises(ConfigError, match="lazy"):
        check_rows_independent(nn.LazyLinear(3), torch.randn(4, 3))


def test_half_precision():
    model = nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8), nn.Linear(8, 8)).bfloat16()
    check_rows_independent(model, torch.randn(4, 8, dtype=torch.bfloat16))
    with pytest.raises(RefusedModelError, match="BatchMean"):
        check_rows_independent(nn.Sequential(model, BatchMean()), torch.randn(4, 8, dtype=torch.bfloat16))
