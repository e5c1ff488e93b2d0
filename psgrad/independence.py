"""Whether the samples of a batch stay apart in a module: change some, see whether others' results move.

The list of types in `psgrad.layers.mixing` is asked on every forward pass; this check costs a few passes of
its own and knows no types, so that it also finds what a custom module does.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.utils._pytree import tree_leaves, tree_map

from psgrad.errors import ConfigError, RefusedModelError, ShapeError
from psgrad.watch import Watch

__all__ = ["Call", "check_rows_independent", "check_samples_apart", "why_mixed"]

SEED = 0

Call = tuple[tuple[Any, ...], dict[str, Any]]
"""args and kwargs."""


def check_rows_independent(module: nn.Module, *inputs: Any, rows_per_sample: int = 1) -> None:
    """Make sure that no sample's result depends on another sample, in the module's present mode.

    Parameters
    ----------
    module
        Any module that `module(*inputs)` runs.
    inputs
        A batch of N >= 2 samples, small but like the real ones: tensors, or containers of tensors, with the
        batch in axis 0. Tensors with another number of rows than the first are taken to be shared.
    rows_per_sample
        K, the consecutive rows of the batch that make one sample.

    Guarantees
    ----------
    Every ordered pair of samples is tried, in `2 ceil(log2 N)` forward passes without gradients beside two
    unchanged ones. Each submodule's outputs and buffers are looked at, so that nothing hides behind a
    head of zeros. A result has moved if it differs by more than two unchanged passes do, on most devices
    by a bit. Not seen is what these inputs do not reach (a branch not taken), and state outside of
    buffers. Random numbers drawn by need (`nn.RReLU`: one a negative entry) are taken for mixing.
    Buffers, parameters, training flags and torch's random state are given back as they were.
    Memory: a copy of the module's state and of every submodule's inputs and outputs.

    Raises
    ------
    RefusedModelError
        If samples are mixed. Names the submodule that ended first of those that were given unmixed
        inputs and returned mixed outputs, or whose buffers take in what they see, and what to use.
    ShapeError
        If the inputs are no batch of at least two samples.
    ConfigError
        If the check would say nothing: inputs that cannot be changed (integers that are all alike), lazy
        layers, or results that differ between two unchanged passes with the same seed.

    """
    samples = _samples(inputs, rows_per_sample)
    if any(is_lazy(t) for t in (*module.parameters(), *module.buffers())):
        raise ConfigError("the module has lazy parameters without a shape: run it on a batch first")
    state = [*module.parameters(), *module.buffers()]
    _check(module, (inputs, {}), samples * rows_per_sample, rows_per_sample, state)


def check_samples_apart(
    module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], rows: int, rows_per_sample: int
) -> None:
    """Check a module that a model calls, as `check_rows_independent` checks a whole one.

    Parameters
    ----------
    module
        Is taken to leave its parameters alone: they are not copied.
    args, kwargs
        Its call.
    rows
        N K of the model's batch, N >= 2, which some tensors of the call have in axis 0.
    rows_per_sample
        K.

    Raises
    ------
    RefusedModelError
        If samples are mixed.
    ConfigError
        If the check would say nothing.

    """
    if not any(_has_rows(leaf, rows) for leaf in tree_leaves((args, kwargs))):
        raise ConfigError("no input is known to be the batch")
    _check(module, (args, kwargs), rows, rows_per_sample, list(module.buffers()))


def _check(module: nn.Module, call: Call, rows: int, rows_per_sample: int, state: list[Tensor]) -> None:
    """See `check_rows_independent`; `state` is what the module may write to.

    Raises
    ------
    RefusedModelError
        If samples are mixed.

    """
    samples = rows // rows_per_sample
    with torch.random.fork_rng(_cuda_devices(module, call)):
        torch.manual_seed(SEED)
        others = tree_map(lambda leaf: _other_values(leaf) if _has_rows(leaf, rows) else leaf, call)
    runs = [(torch.zeros(samples, dtype=torch.bool), call)]
    for changed in _halves(samples):
        mask = changed.repeat_interleave(rows_per_sample)

        def mixed(old: Any, new: Any, mask: Tensor = mask) -> Any:
            return _where(mask, new, old) if _has_rows(old, rows) else old

        runs.append((changed, tree_map(mixed, call, others)))
    if why := why_mixed(module, runs, state):
        raise RefusedModelError(why)


def why_mixed(module: nn.Module, runs: Sequence[tuple[Tensor, Call]], state: list[Tensor]) -> str | None:
    """Say which submodule mixes samples, and what to do, or None.

    Parameters
    ----------
    module
        Any.
    runs
        Which samples are not as in the first, `[N]`, and the call: args and kwargs.
    state
        What the module may write to, beside other buffers' places; given back.

    Raises
    ------
    ConfigError
        If the first run differs from itself run again.

    """
    with (
        torch.random.fork_rng(_cuda_devices(module, [call for _, call in runs])),
        torch.no_grad(),
        _given_back(module, state) as reset,
    ):
        watch = Watch(module)
        reset()
        watch.run(*_copied(runs[0][1]))
        reset()
        watch.run(*_copied(runs[0][1]), changed=runs[0][0])
        watch.settle_noise()
        for changed, call in runs[1:]:
            reset()
            watch.run(*_copied(call), changed=changed)
    return next((f"{seen}: {why}" for seen in watch.calls if (why := seen.why_mixed())), None)


def _copied(call: Call) -> Call:
    """Copy the tensors, to which the module may write."""
    return tree_map(lambda leaf: leaf.detach().clone() if isinstance(leaf, Tensor) else leaf, call)


def _samples(inputs: tuple[Any, ...], rows_per_sample: int) -> int:
    rows = next((t.shape[0] for t in tree_leaves(inputs) if isinstance(t, Tensor) and t.ndim), 0)
    if rows_per_sample < 1 or rows % rows_per_sample or rows < 2 * rows_per_sample:
        raise ShapeError(
            f"the check needs a batch of at least two samples; got {rows} rows with "
            f"rows_per_sample={rows_per_sample}"
        )
    return rows // rows_per_sample


def _has_rows(leaf: Any, rows: int) -> bool:
    return isinstance(leaf, Tensor) and leaf.shape[:1] == (rows,)


def _other_values(t: Tensor) -> Tensor:
    """Values from the range of t (a logarithm or an embedding goes on working) that differ everywhere.

    Raises
    ------
    ConfigError
        If there are none.

    """
    if t.dtype == torch.bool or not t.numel():
        return ~t if t.dtype == torch.bool else t
    low, high = t.min(), t.max()
    if t.is_floating_point():
        spread = torch.where(low == high, torch.ones_like(low), high - low)
        return low + spread * torch.rand_like(t)
    if low == high:
        raise ConfigError(
            f"all entries of a {t.dtype} input {tuple(t.shape)} are alike: give it other values"
        )
    width = int(high - low) + 1
    return low + (t - low + torch.randint_like(t, 1, width)) % width


def _where(mask: Tensor, new: Tensor, old: Tensor) -> Tensor:
    return torch.where(mask.to(old.device).reshape(-1, *(1,) * (old.ndim - 1)), new, old)


def _halves(samples: int) -> Iterator[Tensor]:
    """Masks `[N]` such that of any two samples each is in one mask without the other."""
    for bit in range((samples - 1).bit_length()):
        ones = (torch.arange(samples) >> bit & 1).bool()
        yield ones
        yield ~ones


def _cuda_devices(module: nn.Module, inputs: Any) -> list[int]:
    tensors = [*module.parameters(), *module.buffers(), *tree_leaves(inputs)]
    found = {t.device.index for t in tensors if isinstance(t, Tensor) and t.is_cuda}
    return sorted(index for index in found if index is not None)


@contextmanager
def _given_back(module: nn.Module, state: list[Tensor]) -> Iterator[Any]:
    """Give back state, buffers and training flags; yields what restores them, and torch's seed."""
    flags = [(m, m.training) for m in module.modules()]
    places = [(m._buffers, dict(m._buffers)) for m in module.modules()]
    values = [(t, t.detach().clone()) for t in state]

    def reset() -> None:
        torch.manual_seed(SEED)
        for buffers, before in places:
            buffers.clear()
            buffers.update(before)
        for t, value in values:
            if not torch.equal(t, value):  # a graph that waits for its backward needs t untouched
                t.detach().copy_(value)
        for m, training in flags:
            m.training = training

    try:
        yield reset
    finally:
        reset()
