"""Members one after the other, each captured as a model of its own; their contributions join at the end."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from psgrad.capture import Capture, Consumer, Contribution, PerParameter
from psgrad.capture.recorder import trainable_of
from psgrad.capture.trial import without_trace
from psgrad.ensemble.loop import loop_members, stacked_results
from psgrad.ensemble.members import copy_settings, member_of, tensors_of
from psgrad.ensemble.own import Arguments
from psgrad.ensemble.per_sample.contribution import MemberContribution
from psgrad.ensemble.randomness import MemberRandomness
from psgrad.ensemble.trace import settings_key
from psgrad.held import Held

__all__ = ["JoinedMembers", "LoopedCapture"]


class LoopedCapture:
    """K modules of the members' class over views of the stacked tensors, each with a capture.

    Parameters
    ----------
    stacked
        The module with stacked parameters.
    consumers
        Member k's contributions go to the k-th; its parameters are those of member k's own module.
    rows_per_sample
        As for `Capture`.

    Raises
    ------
    RefusedModelError
        As `Capture`, by paths in the member.

    """

    def __init__(self, stacked: nn.Module, consumers: Sequence[Consumer], rows_per_sample: int) -> None:
        self._stacked = stacked
        self._modules = [member_of(stacked, k) for k in range(len(consumers))]
        self._settings = settings_key(stacked)
        self._captures: list[Capture] = []
        try:
            for module, consumer in zip(self._modules, consumers, strict=True):
                self._captures.append(Capture(module, consumer, rows_per_sample))
        except Exception:
            self.remove()
            raise
        trainable = trainable_of(stacked)
        self.whose: dict[nn.Parameter, nn.Parameter] = {
            p: trainable[name] for module in self._captures for name, p in module.trainable.items()
        }
        """The stacked parameter of every member's trainable parameter."""
        self._follow()

    def run(self, args_of: Callable[[int], Arguments], randomness: MemberRandomness) -> Any:
        """Every member's output, trees of `[K, ...]`."""
        self._follow()
        return stacked_results(
            loop_members(lambda k: args_of(k).given_to(self._modules[k]), len(self._modules), randomness)
        )

    def try_first(self, args: Arguments) -> None:
        """Run the first member for nothing but what its capture refuses: mixed samples.

        Raises
        ------
        RefusedModelError
            By paths in the member.

        """
        self._follow()
        with without_trace(self._stacked):
            args.given_to(self._modules[0])

    @property
    def anchors(self) -> list[Tensor]:
        """The leaves that every member's captured nodes lead to."""
        return [capture.anchor for capture in self._captures]

    def remove(self) -> None:
        """Detach from the members' modules."""
        for capture in self._captures:
            capture.remove()

    def _follow(self) -> None:
        """Let the members' modules be what the stacked one is now: tensors, modes, settings."""
        settings = settings_key(self._stacked)
        if settings != self._settings:
            for module in self._modules:
                copy_settings(self._stacked, module)
            self._settings = settings
        stacked = {name: tensor.detach().unbind() for name, tensor in tensors_of(self._stacked).items()}
        for k, module in enumerate(self._modules):
            for name, tensor in tensors_of(module).items():
                tensor.data = stacked[name][k]
            for own, common in zip(module.modules(), self._stacked.modules(), strict=True):
                for name, value in vars(common).items():
                    if isinstance(value, bool | int | float | str):  # also `training`
                        own.__dict__[name] = value


@dataclass(frozen=True)
class JoinedMembers(MemberContribution):
    """What K members contributed to the same stacked parameters.

    Attributes
    ----------
    parts
        Member k's contributions with their squared norms, every parameter of the member in one of them; none
        of a member that the backward pass did not reach.
    whose
        The stacked parameter of a member's.

    """

    path: str
    samples: int
    parameters: tuple[nn.Parameter, ...]
    parts: tuple[tuple[tuple[Contribution, PerParameter], ...], ...]
    whose: Mapping[nn.Parameter, nn.Parameter]

    def grads(self) -> PerParameter:
        """See `Contribution.grads`; `[K, N, *shape]`."""
        return self._stacked(
            [[contribution.grads() for contribution, _ in part] for part in self.parts],
            lambda p: p.new_zeros(self.samples, *p.shape[1:]),
        )

    def sq_norms(self) -> PerParameter:
        """See `Contribution.sq_norms`; `[K, N]`."""
        dtypes = [n.dtype for part in self.parts for _, norms in part for n in norms.values()]
        return self._stacked(
            [[norms for _, norms in part] for part in self.parts],
            lambda p: p.new_zeros(self.samples, dtype=dtypes[0]),
        )

    def weighted_sum(self, factors: Tensor) -> PerParameter:
        """See `Contribution.weighted_sum`; `factors` is `[K, N]`, and member k's sum in entry k."""
        return self._stacked(
            [
                [contribution.weighted_sum(own) for contribution, _ in part]
                for part, own in zip(self.parts, factors, strict=True)
            ],
            lambda p: p.new_zeros(p.shape[1:]),
        )

    def tensors(self) -> Iterable[Tensor]:
        """See `Contribution.tensors`."""
        return [t for part in self.parts for contribution, _ in part for t in contribution.tensors()]

    def kept(self) -> Contribution:
        """See `Contribution.kept`: the members' parts are held in their form already."""
        return self

    def _stacked(
        self, found: Sequence[Sequence[PerParameter]], zeros: Callable[[nn.Parameter], Tensor]
    ) -> PerParameter:
        by_member = [{self.whose[p]: t for each in part for p, t in each.items()} for part in found]
        return {
            p: torch.stack([own[p] if p in own else zeros(p) for own in by_member]) for p in self.parameters
        }


def joined(
    held: Sequence[Held], whose: Mapping[nn.Parameter, nn.Parameter], samples: int
) -> list[JoinedMembers]:
    """Join what K members held, into as few parameters a contribution as the members allow."""
    settled = [member.settled() for member in held]
    paths: dict[frozenset[nn.Parameter], str] = {}
    for contribution, _ in (entry for entries in settled for entry in entries):
        together = frozenset(whose[p] for p in contribution.parameters)
        for other in [group for group in paths if group & together]:
            paths.pop(other)
            together |= other
        paths[together] = contribution.path
    return [
        JoinedMembers(
            path,
            samples,
            tuple(group),
            tuple(
                tuple(entry for entry in entries if whose[entry[0].parameters[0]] in group)
                for entries in settled
            ),
            whose,
        )
        for group, path in paths.items()
    ]
