"""The same module run several times: which tensors moved where, call by call.

What `psgrad.independence` judges by.
"""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from psgrad.errors import ConfigError
from psgrad.layers import why_samples_mix

__all__ = ["Call", "Watch", "Watched"]


class Watched:
    """A tensor of the first run, and where its samples may be, judging by the runs since."""

    def __init__(self, value: Tensor) -> None:
        self.value = value
        self.noise = 0.0
        self.unmoved = True
        self.layouts: set[tuple[int, bool]] | None = None  # axis; samples in blocks (or else by turns)

    def compare(self, other: Tensor | None, changed: Tensor) -> None:
        """Take in another run's value, in which the `changed` samples, `[N]`, were others."""
        if other is None or other.shape != self.value.shape:
            self.unmoved, self.layouts = False, set()
            return
        distance = _distance(other, self.value)
        if not changed.any():
            self.noise = float(distance.max()) if distance.numel() else 0.0
            return
        moved = distance > 8 * self.noise
        self.unmoved = self.unmoved and not bool(moved.any())
        if self.layouts is None:
            axes = [axis for axis, size in enumerate(moved.shape) if size and size % len(changed) == 0]
            self.layouts = {(axis, blocks) for axis in axes for blocks in (True, False)}
        self.layouts = {layout for layout in self.layouts if not _moved_beside(moved, layout, changed)}

    @property
    def apart(self) -> bool:
        """Whether one way of finding samples in the tensor leaves each where it was, in every run."""
        return self.unmoved or bool(self.layouts)

    @property
    def random(self) -> bool:
        """Whether the unchanged passes differ by more than a kernel's order of summation explains."""
        if not self.value.is_floating_point() or not self.value.numel():
            return self.noise > 0
        scale = self.value.abs().nan_to_num(0.0, 0.0, 0.0).max()
        return self.noise > 1e-2 * float(scale)


@dataclass
class Call:
    """One call of one submodule."""

    path: str
    module: nn.Module
    inputs: list[Watched]
    outputs: list[Watched]
    buffers: list[Watched]

    def __str__(self) -> str:
        return f"{self.path or 'the model itself'} ({type(self.module).__name__})"

    def compare(self, seen: tuple[list[Tensor], ...], changed: Tensor) -> None:
        """Take in the same call of another run; what is missing has moved."""
        for watched, tensors in zip((self.inputs, self.outputs, self.buffers), seen, strict=True):
            missing = [None] * (len(watched) - len(tensors))
            for old, new in zip(watched, [*tensors, *missing], strict=False):
                old.compare(new, changed)

    def why_mixed(self) -> str | None:
        """Why this call is to blame for mixed samples, and what to do; None if it is not."""
        if not all(x.apart for x in self.inputs):
            return None  # it was given them mixed
        stateful = not all(buffer.unmoved for buffer in self.buffers)
        if all(out.apart for out in self.outputs) and not stateful:
            return None
        known = why_samples_mix(self.module)
        if known is not None:
            return f"mixes samples: it {known}"
        if stateful:
            return (
                "keeps what it saw of the batch in its buffers; keep it in eval() mode, or drop these buffers"
            )
        return (
            "mixes samples: one sample's output moved when another sample was changed. Compute over other "
            "axes than the batch (axis 0), normalise with GroupNorm or LayerNorm, or use its eval() mode"
        )


class Watch:
    """Runs a module and compares every call of every submodule, in the order in which calls end."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.calls: list[Call] = []

    def run(self, args: tuple[Any, ...], kwargs: dict[str, Any], changed: Tensor | None = None) -> None:
        """Run on these inputs; the first run is what the others are compared with."""
        open_calls: list[list[Tensor]] = []
        position = iter(range(len(self.calls)))

        def before(module: nn.Module, given: Any, named: Any) -> None:
            open_calls.append(_tensors((given, named)))  # now: the module may work in place

        def after(path: str, module: nn.Module, output: Any) -> None:
            seen = (open_calls.pop(), _tensors(output), _tensors(list(module._buffers.values())))
            if changed is None:
                inputs, outputs, buffers = ([Watched(t) for t in tensors] for tensors in seen)
                self.calls.append(Call(path, module, inputs, outputs, buffers))
                return
            # other calls than in the first run (a branch on values): only the whole is comparable then
            i = next(position, -1) if path else -1
            if self.calls[i].path == path:
                self.calls[i].compare(seen, changed)

        with ExitStack() as hooks:
            for path, m in self.module.named_modules():
                for handle in (
                    m.register_forward_pre_hook(before, with_kwargs=True),
                    m.register_forward_hook(lambda m, _, output, path=path: after(path, m, output)),
                ):
                    hooks.callback(handle.remove)
            self.module(*args, **kwargs)

    def settle_noise(self) -> None:
        """Raise if two unchanged passes differ by more than rounding.

        Raises
        ------
        ConfigError
            As said, naming the submodule.

        """
        for call in self.calls:
            if any(out.random for out in call.outputs):
                raise ConfigError(
                    f"{call}: two passes over the same batch with the same seed differ; make it draw its "
                    "random numbers from torch, and keep its state in buffers"
                )


def _distance(new: Tensor, old: Tensor) -> Tensor:
    """How far each entry has moved, float; inf to or from what is not finite."""
    if not old.is_floating_point():
        return (new != old).double()
    same = (new == old) | (new.isnan() & old.isnan())
    return (new - old).abs().nan_to_num(torch.inf, torch.inf).masked_fill(same, 0)


def _moved_beside(moved: Tensor, layout: tuple[int, bool], changed: Tensor) -> bool:
    """Whether entries moved that belong to samples which were not changed."""
    axis, blocks = layout
    sizes = (len(changed), -1) if blocks else (-1, len(changed))
    by_sample = moved.unflatten(axis, sizes).movedim(axis if blocks else axis + 1, 0)
    return bool(by_sample[~changed.to(moved.device)].any())


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf.detach().clone() for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]
