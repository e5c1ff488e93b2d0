"""Ways by which a gradient that was not clipped, or was clipped twice, could reach a private step."""

import warnings

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from psgrad import CaptureError, ConfigError
from psgrad.dp import PrivacyEngine
from tests.dp import problems
from tests.dp.problems import backward, flat, in_parts, loader_of, network, private, train


def test_gradients_from_before_the_optimizer_are_dropped():
    model = network()
    (model(torch.randn(8, 2, 5)) * 1e6).sum().backward()
    _, optimizer, loader = private(model=model, noise_multiplier=0.0, poisson_sampling=False)
    before = flat(model)
    x, y = next(iter(loader))
    backward(model, x, y)
    optimizer.step()
    assert (flat(model) - before).norm() <= 0.5 * 0.1  # the rate, times C: all four samples over the divisor


def test_no_step_after_the_handle_is_removed():
    model, optimizer, _ = private()
    optimizer.clip.remove()
    (model(torch.randn(4, 2, 5)) * 1e6).sum().backward()
    with pytest.raises(ConfigError, match="handle was removed"):
        optimizer.step()


def test_an_attack_on_the_inputs_adds_nothing_to_the_step():
    model, optimizer, loader = private(noise_multiplier=0.0)
    x, y = next(batch for batch in loader if len(batch[0]))
    x, before = x.requires_grad_(), flat(model)
    (grad,) = torch.autograd.grad(F.cross_entropy(model(x), y), x)
    assert all(p.grad is None for p in model.parameters())
    with pytest.raises(ConfigError, match="without a clipped gradient"):
        optimizer.step()
    assert torch.equal(flat(model), before)
    backward(model, (x + 0.1 * grad.sign()).detach(), y)
    optimizer.step()
    assert optimizer.accountant.history[-1][-1] == 1


def test_no_step_of_the_optimizer_inside():
    """The name that a script had for it before is still there."""
    model = network()
    inner = torch.optim.SGD(model.parameters(), lr=0.5)
    model, optimizer, loader = private(model=model, optimizer=lambda _: inner)
    before = flat(model)
    for x, y in loader:
        backward(model, x, y)
        with pytest.raises(ConfigError, match="no noise"):
            inner.step()
        assert torch.equal(flat(model), before)
        break
    optimizer.step()
    assert not torch.equal(flat(model), before)
    optimizer.clip.remove()
    backward(model, x, y)
    inner.step()  # as it ever was


def test_a_private_optimizer_that_is_made_private_anew():
    """Another bound for the second half of a run, as Opacus allows."""
    engine = PrivacyEngine()
    model, optimizer, loader = private(engine)
    train(model, optimizer, loader)
    optimizer.clip.remove()
    model, again, loader = private(
        engine, model=model, optimizer=lambda _: optimizer, loader=loader, noise_multiplier=2.0
    )
    assert again.original_optimizer is optimizer.original_optimizer
    train(model, again, loader)
    assert engine.accountant.history == [(1.0, 0.25, 4), (2.0, 0.25, 4)]


def test_a_backbone_that_is_thawed_outside_of_the_private_module_is_not_trained():
    """Its gradients are whole, without clipping or noise, and the optimizer has held it from the start."""
    backbone = torch.nn.Conv1d(2, 2, 1).requires_grad_(False)
    head, optimizer, loader = private(
        optimizer=lambda ps: torch.optim.SGD([*ps, *backbone.parameters()], lr=0.5)
    )
    batches = iter(loader)
    x, y = next(batches)
    backward(head, backbone(x), y)
    optimizer.step()
    before = flat(backbone), flat(head)
    backbone.requires_grad_(True)
    x, y = next(batch for batch in batches if len(batch[0]))
    backward(head, backbone(x), y)
    with pytest.raises(ConfigError, match=r"2 parameters that are not clipped, of shapes \(2, 2, 1\)"):
        optimizer.step()
    assert all(map(torch.equal, before, (flat(backbone), flat(head))))
    assert optimizer.accountant.history[0][-1] == 1


def test_two_losses_over_one_forward_pass():
    model, _, loader = private()
    x, y = next(batch for batch in loader if len(batch[0]))
    out = model(x)
    out.mean().backward(retain_graph=True)
    with pytest.raises(CaptureError, match="second time"):
        F.cross_entropy(out, y).backward()


def test_more_samples_than_were_drawn_are_reported():
    model, optimizer, loader = private()
    batches = iter(loader)
    for views in (1, 2):
        x, y = next(batch for batch in batches if len(batch[0]))
        for _ in range(views):
            backward(model, x, y)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            optimizer.step()
        told = [str(w.message) for w in caught if "twice its bound" in str(w.message)]
        assert len(told) == views - 1
        assert not told or f"{2 * len(x)} samples, on a batch of {len(x)}" in told[0]


@pytest.mark.parametrize("poisson", [True, False])
def test_batches_of_the_original_loader_are_reported_once(poisson):
    original = loader_of()
    model, optimizer, loader = private(loader=original, poisson_sampling=poisson)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        train(model, optimizer, original)
    told = [w for w in caught if "did not come from the loader" in str(w.message)]
    assert len(told) == poisson
    assert all(w.filename == problems.__file__ for w in told)  # where step() was called
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        train(model, optimizer, loader)


def twice(samples):
    return torch.utils.data.default_collate([sample for sample in samples for _ in range(2)])


@pytest.mark.parametrize("physical", [None, 5])
def test_a_collation_that_makes_several_rows_of_a_sample_is_reported(physical):
    """Crops of an image, windows of a text: each row would be clipped on its own."""
    model, optimizer, loader = private(loader=loader_of(24, 8, collate_fn=twice))
    batches = loader if physical is None else in_parts(loader, optimizer, physical).__enter__()
    with pytest.warns(UserWarning, match="twice its bound"):
        train(model, optimizer, batches)
    optimizer.clip.remove()
    _, optimizer, loader = private(loader=loader, model=model, rows_per_sample=2)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        train(model, optimizer, loader)


def test_the_divisor_cannot_be_moved_by_an_attribute():
    _, optimizer, _ = private()
    with pytest.raises(AttributeError, match="expected_batch_size"):
        optimizer.expected_batch_size = 100


def test_hooks_around_the_step():
    model, optimizer, loader = private()
    seen = []
    optimizer.register_step_pre_hook(lambda *_: seen.append("before"))
    optimizer.register_step_post_hook(lambda *_: seen.append("after"))
    x, y = next(iter(loader))
    backward(model, x, y)
    optimizer.step()
    assert seen == ["before", "after"]


class Records(torch.utils.data.Dataset):
    def __len__(self):
        return 8

    def __getitem__(self, i):
        return {"x": torch.full((3,), float(i)), "y": i % 2}


def test_a_first_batch_of_dicts_that_is_empty():
    loader = torch.utils.data.DataLoader(Records(), batch_size=1)
    for seed in range(8):
        loader.generator = torch.Generator().manual_seed(seed)
        _, _, drawn = private(loader=loader)
        first = next(iter(drawn))
        assert first["x"].shape[1:] == (3,)
        assert len(first["x"]) == len(first["y"])


@pytest.mark.parametrize("norm", [torch.tensor(0.1), torch.tensor([0.1])[0], np.float32(0.1)])
def test_a_norm_of_another_library_is_a_number(norm):
    _, optimizer, _ = private(max_grad_norm=norm)
    assert optimizer.clip.l2_bound == pytest.approx(0.1)


@pytest.mark.parametrize("of", [np.array, torch.tensor, tuple])
def test_norms_of_another_library_are_a_list(of):
    _, optimizer, _ = private(max_grad_norm=of([0.1] * 6), clipping="per_layer")
    assert optimizer.clip.l2_bound == pytest.approx(0.1 * 6**0.5)
