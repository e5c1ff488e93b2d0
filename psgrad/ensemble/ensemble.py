"""`Ensemble`: K models of one architecture as one module, each exactly as if it were alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from psgrad.capture import Consumer
from psgrad.capture.shadow import is_shadowed
from psgrad.ensemble.alone import refuse_changed, versions
from psgrad.ensemble.eager import KeptBlocks, eager_losses
from psgrad.ensemble.execution import Execution
from psgrad.ensemble.loop import hold_members
from psgrad.ensemble.losses import member_losses, stacked_losses
from psgrad.ensemble.members import kept_members, member_of, stack_members, tensors_of
from psgrad.ensemble.own import arguments_of, holds_tensors, part_of
from psgrad.ensemble.per_sample import MemberCapture
from psgrad.ensemble.plan import EnsemblePlan
from psgrad.ensemble.prediction import Prediction, predicted_classes, predicted_values
from psgrad.ensemble.randomness import MemberRandomness, given_back, put_back_after
from psgrad.ensemble.single import SingleMember
from psgrad.errors import ConfigError, MemberError, ShapeError
from psgrad.loss import LossCheck, judge_member_loss

__all__ = ["Ensemble", "Strategy"]

Strategy = Literal["auto", "folded", "loop"]


class Ensemble(nn.Module):
    """K models of one architecture, fitted at once.

    `parameters()` are ordinary ones, every member's `[...]` stacked to `[K, ...]`, under the member's names
    behind the prefix `stacked.`; so are the buffers. Sum the losses to train, never take their mean: then
    every member's gradient is its own.

    Build one with `from_factory` or `from_modules`. Their `strategy` is "auto" (folded where that is right
    and estimated to be faster), "folded" (wherever it is right) or "loop"; `plan` says what it came to.

    Attributes
    ----------
    stacked
        A module of the members' class that holds the stacked parameters and buffers. It is not to be
        called itself.
    execution, single, kept, randomness
        How it runs, how one member does, memory for gradients, and the members' random streams.

    """

    per_sample_refusal = (
        "a sample has K gradients in an ensemble: give the handle the ensemble itself, not a model with one"
        " inside"
    )
    """Why handles refuse a model with an ensemble inside."""

    def __init__(
        self, modules: Sequence[nn.Module], randomness: MemberRandomness, strategy: Strategy = "auto"
    ) -> None:
        super().__init__()
        if strategy not in get_args(Strategy):
            raise ConfigError(f"strategy must be one of {get_args(Strategy)}, got {strategy!r}")
        self.stacked = stack_members(modules)
        self.randomness = randomness
        self.execution = Execution(self.stacked, strategy)
        self.single = SingleMember(self.stacked)
        self.kept = KeptBlocks()
        self.training = self.stacked.training

    @classmethod
    def from_factory(
        cls, fn: Callable[[], nn.Module], seeds: Sequence[int] = range(8), *, strategy: Strategy = "auto"
    ) -> Ensemble:
        """Member k is what `fn()` builds under `torch.manual_seed(seeds[k])`.

        Guarantees
        ----------
        The global random state is given back. Member k's random stream (dropout) goes on where building it
        ended: it draws what `torch.manual_seed(seed); model = fn()` and training that model would draw, if
        nothing else draws from the global CPU stream in between.

        Raises
        ------
        MemberError
            If two seeds are equal modulo 2**32, which PyTorch does not tell apart, or what `fn` builds does
            not fit together (see `check_members`).

        """
        seeds = [int(seed) for seed in seeds]
        if len({seed % 2**32 for seed in seeds}) != len(seeds):  # all that PyTorch's generator takes of them
            raise MemberError(
                f"seeds must differ in their lowest 32 bits, or members are the same model, got {seeds}"
            )
        modules, states = [], []
        with given_back():
            for seed in seeds:
                torch.manual_seed(seed)
                modules.append(fn())
                states.append(torch.get_rng_state())
        return cls(modules, MemberRandomness(states), strategy)

    @classmethod
    def from_modules(
        cls, modules: Sequence[nn.Module], seeds: Sequence[int] | None = None, *, strategy: Strategy = "auto"
    ) -> Ensemble:
        """Members are copies of these modules, bitwise; the modules themselves stay untouched.

        Member k's random stream (dropout) begins as after `torch.manual_seed(seeds[k])`, k without seeds.

        Raises
        ------
        MemberError
            If the modules do not fit together (see `check_members`), or seeds are not one a member.

        """
        modules = list(modules)
        seeds = list(range(len(modules)) if seeds is None else seeds)
        if len(seeds) != len(modules):
            raise MemberError(f"{len(seeds)} seeds for {len(modules)} modules")
        return cls(modules, MemberRandomness.of_seeds(seeds), strategy)

    def per_sample_capture(
        self, consumer: Consumer, rows_per_sample: int, loss: LossCheck | None = None
    ) -> MemberCapture:
        """Capture every member's per-sample gradients: what `psgrad.capture.attach` asks for."""
        return MemberCapture(self, consumer, rows_per_sample, loss)

    @property
    def members(self) -> int:
        """K, the number of members."""
        return len(self.randomness)

    def member(self, k: int) -> nn.Module:
        """Return member k as a plain module of its own class, bitwise the same weights and buffers.

        Raises
        ------
        IndexError
            If there is no such member.

        """
        if not -self.members <= k < self.members:
            raise IndexError(f"member {k} of {self.members}")
        return member_of(self.stacked, k)

    def forward(self, *inputs: Any, own: bool = False, **named: Any) -> Any:
        """Every member's output, `[K, N, ...]`.

        Parameters
        ----------
        *inputs
            The member's positional arguments, tensors or trees of them (tuples, lists, dicts). Tensors are
            `[N, ...]`, the same for all members; with `own` `[K, N, ...]`, every member its own. What is no
            tensor goes to every member.
        own
            Whether the tensors have the member axis in front. Never guessed from a shape.
        **named
            The member's arguments by name, just as those by position.

        Returns
        -------
        Tensor, or the tree of tensors that a member returns
            Each with K in front.

        Raises
        ------
        ShapeError
            If `own` and a tensor's first axis is not K.
        MemberError
            If members return what cannot be stacked, or what one's forward pass leaves behind would reach the
            next: a plain attribute, an input changed in place.

        """
        arguments = arguments_of(self.stacked, inputs, named)
        self.check_own(arguments, own)
        return self.execution.run(arguments, own, self.members, self.randomness)

    def own(self, *inputs: Any, **named: Any) -> Any:
        """Every member's output on its own data: `ens(*inputs, **named, own=True)`."""
        return self(*inputs, own=True, **named)

    def loss(
        self, fn: Callable[[Any, Any], Tensor], x: Any, y: Any, *, own: bool = False, **named: Any
    ) -> Tensor:
        """Every member's loss, `[K]`; `.sum().backward()` gives every member its own gradient.

        Parameters
        ----------
        fn
            From a member's output `[N, ...]` and its targets `[N, ...]` to a scalar.
        x
            Input, `[N, ...]`, or with `own` `[K, N, ...]`; a tuple for a member with several.
        y
            Targets, `[N, ...]`, or with `own` `[K, N, ...]`; a tree of them where `fn` takes one.
        own
            Whether x, y and `named` have the member axis in front.
        **named
            More of the member's arguments, by name.

        Notes
        -----
        Where several members run one after the other, the gradients are taken here, member by member, and
        `backward` hands them on: once. Under `torch.no_grad` nothing of that is done.

        Raises
        ------
        ShapeError
            If `fn` does not return a scalar, or as for `forward`.
        ConfigError
            If members are clipped, and `fn` is not the mean or the sum that was said.
        MemberError
            If what one member's forward pass leaves behind would reach the next.

        """
        inputs = arguments_of(self.stacked, x if isinstance(x, tuple) else (x,), named)
        self.check_own((y, *inputs), own)
        captured = is_shadowed(self)  # then gradients are not to be taken before the backward pass
        members, randomness = self.members, self.randomness
        why = None if captured else self.execution.settled(inputs, own, members, randomness)
        if why is not None:
            stacked = self.stacked

            def compute(k: int) -> Tensor:
                if own:
                    return fn(inputs.part_given_to(stacked, k), part_of(y, k))
                return fn(inputs.given_to(stacked), y)

            self.execution.note_loop(members, why)
            recorded = torch.is_grad_enabled()
            single = self.single.loss(compute, randomness) if members == 1 and recorded else None
            if single is not None:
                return single
            before = versions((y, *inputs))
            if recorded and not _scales_losses():
                losses = eager_losses(stacked, compute, randomness, self.kept)
            else:
                losses = stacked_losses(hold_members(stacked, compute, members, randomness))
            if members > 1:
                refuse_changed(before, (y, *inputs))
            return losses
        args, kwargs = inputs.split()
        outputs = self(*args, own=own, **kwargs)
        judge_member_loss(fn, outputs, y, own)
        return member_losses(fn, outputs, y, own, self.randomness)

    @torch.no_grad()
    def predict(self, *inputs: Any, own: bool = False, link: str = "softmax", **named: Any) -> Prediction:
        """Predict in eval mode and without gradients; the mode is given back.

        Parameters
        ----------
        *inputs, own, **named
            As for `forward`.
        link
            "softmax" for logits `[N, classes, ...]`, "identity" for values.

        Raises
        ------
        ConfigError
            If there is no such link.
        ShapeError
            If members do not return one tensor, for "softmax" of two classes at least.

        """
        if link not in ("softmax", "identity"):
            raise ConfigError(f'link must be "softmax" or "identity", got {link!r}')
        modes = {module: module.training for module in self.modules()}
        self.eval()
        try:
            outputs = self(*inputs, own=own, **named)
        finally:
            for module, mode in modes.items():
                module.training = mode
        return predicted_classes(outputs) if link == "softmax" else predicted_values(outputs)

    @torch.no_grad()
    def plan(self, *inputs: Any, own: bool = False, **named: Any) -> EnsemblePlan:
        """How a call on such inputs runs, layer by layer, and why; `print` it.

        It is found by running it: buffers and random streams are given back.
        """
        with put_back_after(self, self.randomness), torch.set_grad_enabled(self.training):
            self(*inputs, own=own, **named)
        assert self.execution.last_plan is not None
        return self.execution.last_plan

    def keep(self, indices: Sequence[int]) -> None:
        """Drop every member but these, in this order; parameters stay the same objects.

        Gradients, buffers and random streams follow. An optimizer's state does not: `psgrad.ensemble`'s own
        optimizers have a `keep` too.

        Raises
        ------
        MemberError
            If there is none, one stands twice or does not exist.
        ConfigError
            If a per-sample handle is attached.

        """
        if is_shadowed(self):
            raise ConfigError("keep changes the members that are captured: remove() the handle before")
        kept = kept_members(indices, self.members)
        for tensor in tensors_of(self.stacked).values():
            grad, data = tensor.grad, tensor.data[kept]
            tensor.grad = None
            # Another dtype in between makes autograd forget the old shape, which a graph that is still
            # alive (last step's loss) would otherwise keep.
            other = torch.float64 if data.dtype != torch.float64 else torch.float32
            tensor.data = data.new_empty(0, dtype=other)
            tensor.data = data
            tensor.grad = None if grad is None else grad[kept]
        self.randomness = MemberRandomness(list(self.randomness.states[kept]))

    def get_extra_state(self) -> Tensor:
        """`[K, bytes]`: the members' random states, part of `state_dict`."""
        return self.randomness.states

    def set_extra_state(self, state: Tensor) -> None:
        """Take up the members' random streams from a `state_dict`.

        Raises
        ------
        MemberError
            If it is of another number of members.

        """
        if len(state) != self.members:
            raise MemberError(f"the state is of {len(state)} members, the ensemble has {self.members}")
        self.randomness = MemberRandomness(list(state.cpu()))

    def check_own(self, inputs: Sequence[Any], own: bool) -> None:
        """Raise if these inputs are not what `own` says.

        Raises
        ------
        ConfigError
            If `own` is no bool.
        ShapeError
            If it is True and a tensor's first axis is not K, or something that is no tree holds tensors.

        """
        if not isinstance(own, bool):
            raise ConfigError(f"own must be True or False, got {own!r}")
        if not own:
            return
        members = self.members
        plain = all(isinstance(value, Tensor) for value in inputs)  # trees take longer than a small step may
        for value in inputs if plain else tree_leaves(list(inputs)):
            if not plain and holds_tensors(value):
                raise ShapeError(
                    f"a {type(value).__name__} holds tensors of which a member's part cannot be taken: give"
                    " own data as tensors, in tuples, lists or dicts"
                )
            if isinstance(value, Tensor) and value.shape[:1] != (members,):
                raise ShapeError(
                    f"own data of {members} members is [K, N, ...] with K = {members}, got"
                    f" {tuple(value.shape)}. Data that all members share goes without own."
                )


def _scales_losses() -> bool:
    """Whether losses are to be scaled before any gradient is taken: float16 underflows otherwise."""
    on = torch.is_autocast_enabled("cpu"), torch.is_autocast_enabled("cuda")
    kinds = torch.get_autocast_dtype("cpu"), torch.get_autocast_dtype("cuda")
    return any(enabled and kind is torch.float16 for enabled, kind in zip(on, kinds, strict=True))
