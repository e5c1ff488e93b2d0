"""Modules to one module with stacked parameters and back, and what members must have in common."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.prune import BasePruningMethod
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

from psgrad.ensemble.alike import Comparison, class_name
from psgrad.errors import MemberError
from psgrad.module_tables import ModuleTables

__all__ = [
    "Held",
    "Slots",
    "changed_settings",
    "check_members",
    "copy_settings",
    "kept_members",
    "member_of",
    "stack_members",
    "tensors_of",
    "with_tensors",
]


def tensors_of(module: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers by path; a tied one once, under its first path."""
    return {**dict(module.named_parameters()), **dict(module.named_buffers())}


class Slots:
    """Where a stacked module keeps its parameters and buffers, to run it as one member after the other.

    What `torch.func.functional_call` does for a call, at a tenth of its time: the members' tensors are put
    straight into the modules' tables, and the stacked ones are put back when the block ends.
    """

    def __init__(self, stacked: nn.Module) -> None:
        self._tables = ModuleTables(stacked)
        self.modules: list[nn.Module] = self._tables.modules
        """Each once."""
        self._slots: list[tuple[dict[str, Any], str, Tensor]] = [
            (table, name, tensor)
            for module in self.modules
            for table in (module._parameters, module._buffers)
            for name, tensor in table.items()
            if tensor is not None
        ]
        self.tensors: list[Tensor] = list({id(tensor): tensor for *_, tensor in self._slots}.values())
        """Stacked parameters and buffers, each once."""

    def hold(self) -> bool:
        """Whether the module still has these modules, parameters and buffers, and no others."""
        return self._tables.hold()

    def holding(self, parts: Mapping[Tensor, Tensor], assigned: dict[Tensor, Tensor] | None = None) -> Held:
        """Return a block, to be entered as often as one likes, in which every slot holds its tensor's part.

        Parameters
        ----------
        parts
            Of every stacked tensor.
        assigned
            As for `Held`.

        """
        return Held([(table, name, tensor, parts[tensor]) for table, name, tensor in self._slots], assigned)


class Held:
    """A block in which modules hold other tensors in their slots.

    A buffer that is assigned anew inside (`self.mean = ...`) is copied into its part.

    Parameters
    ----------
    places
        Table, name, the tensor that stands there, the one that stands there inside.
    assigned
        Takes by part what was assigned in its place, which is then not copied: autograd may need the part.

    Raises
    ------
    MemberError
        At the end, if what was assigned inside is no tensor of the same shape and dtype, or takes a
        parameter's place.

    """

    def __init__(
        self,
        places: Sequence[tuple[dict[str, Any], str, Tensor, Tensor]],
        assigned: dict[Tensor, Tensor] | None = None,
    ) -> None:
        self._places = places
        self._assigned = assigned

    def __enter__(self) -> None:
        for table, name, _, part in self._places:
            table[name] = part

    def __exit__(self, kind: type[BaseException] | None, *error: object) -> None:
        try:
            if kind is None:
                for table, name, tensor, part in self._places:
                    if table.get(name) is not part:
                        found = _fitting(table.get(name), part, name, isinstance(tensor, nn.Parameter))
                        if self._assigned is None:
                            part.detach().copy_(found)
                        else:
                            self._assigned[part] = found
        finally:
            for table, name, tensor, _ in self._places:
                table[name] = tensor


def _fitting(assigned: Tensor | None, part: Tensor, name: str, is_parameter: bool) -> Tensor:
    """Return what forward assigned to the name of a part.

    Raises
    ------
    MemberError
        If it does not fit, or the part is a parameter.

    """
    alike = assigned is not None and (assigned.shape, assigned.dtype) == (part.shape, part.dtype)
    if is_parameter or not alike:
        raise MemberError(
            f"forward replaces {name} by another parameter or one of another shape or dtype, which a stack of"
            " members cannot hold: change it in place"
        )
    assert assigned is not None
    return assigned.detach()


def stack_members(modules: Sequence[nn.Module]) -> nn.Module:
    """One module of the members' class whose parameters and buffers are `[K, ...]`; shares no storage.

    A parameter that a member uses under several names is one stacked parameter under these names.

    Raises
    ------
    MemberError
        As `check_members`.

    """
    check_members(modules)
    tensors = [tensors_of(module) for module in modules]
    memo: dict[int, Any] = {}
    for path, first in tensors[0].items():
        stacked = torch.stack([member[path].detach() for member in tensors])
        is_parameter = isinstance(first, nn.Parameter)
        memo[id(first)] = (
            nn.Parameter(stacked, requires_grad=first.requires_grad) if is_parameter else stacked
        )
    return copy.deepcopy(modules[0], memo)


def member_of(stacked: nn.Module, k: int) -> nn.Module:
    """Member k as a module of its own: its class, its weights and buffers, no shared storage."""
    memo: dict[int, Any] = {}
    for tensor in tensors_of(stacked).values():
        own = tensor.detach()[k].clone()
        is_parameter = isinstance(tensor, nn.Parameter)
        memo[id(tensor)] = nn.Parameter(own, requires_grad=tensor.requires_grad) if is_parameter else own
    return copy.deepcopy(stacked, memo)


def copy_settings(stacked: nn.Module, member: nn.Module) -> None:
    """Give a module of `member_of` copies of what the stacked one holds now besides tensors and modules."""
    memo: dict[int, Any] = {id(common): own for common, own in _counterparts(stacked, member)}
    for own, common in zip(member.modules(), stacked.modules(), strict=True):
        for name, value in vars(common).items():
            if name not in _EVERY_MODULES:
                own.__dict__[name] = copy.deepcopy(value, memo)


def with_tensors(
    module: nn.Module, parameters: Callable[[Tensor], Tensor], buffers: Callable[[Tensor], Tensor]
) -> nn.Module:
    """Return a layer like this one, of other parameters and buffers; whatever else it has is the same."""
    other = module.__new__(type(module))
    other.__dict__.update(module.__dict__)
    other._parameters = {n: None if t is None else parameters(t) for n, t in module._parameters.items()}  # type: ignore[misc]  # torch's own dict
    other._buffers = {n: None if t is None else buffers(t) for n, t in module._buffers.items()}
    return other


def _refuse_layers(module: nn.Module, k: int, members: int) -> None:
    for path, layer in module.named_modules():
        if members > 1 and isinstance(layer, nn.Embedding | nn.EmbeddingBag) and layer.sparse:
            raise MemberError(
                f"{path or 'the module itself'} of member {k} has sparse gradients, which cannot be stacked:"
                " build it with sparse=False"
            )
        for hook in layer._forward_pre_hooks.values():
            if isinstance(hook, WeightNorm | SpectralNorm | BasePruningMethod):
                name = getattr(hook, "name", getattr(hook, "_tensor_name", "weight"))
                raise MemberError(
                    f"{f'{path}.{name}'.lstrip('.')} of member {k} is computed by a hook"
                    f" ({type(hook).__name__}), which members cannot share: use weight_norm or spectral_norm"
                    " of torch.nn.utils.parametrizations, or after pruning prune.remove"
                )


def check_members(modules: Sequence[nn.Module]) -> None:
    """Refuse modules that are not K separate modules alike in all but the values of their tensors.

    Raises
    ------
    MemberError
        If there is none, one stands twice, a parameter is shared, or structure, settings, shapes, dtypes,
        devices, ties, what is frozen, or train and eval mode differ, or a layer's weights are computed by a
        hook or have sparse gradients; the message names the members.

    """
    if not modules:
        raise MemberError("an ensemble needs at least one member")
    owners: dict[int, tuple[int, str]] = {}
    for k, module in enumerate(modules):
        if not isinstance(module, nn.Module):
            raise MemberError(f"member {k} is a {type(module).__name__}, not an nn.Module")
        _refuse_layers(module, k, len(modules))
        for path, parameter in module.named_parameters():
            other, other_path = owners.setdefault(id(parameter), (k, path))
            if other != k:
                raise MemberError(
                    f"the parameter {path} of member {k} is {other_path} of member {other}: members share"
                    " nothing. Build every member anew, or copy.deepcopy it."
                )
            if isinstance(parameter, nn.parameter.UninitializedParameter):
                raise MemberError(
                    f"the parameter {path} of member {k} has no shape yet: run the lazy module once before"
                )
    for k, module in enumerate(modules[1:], 1):
        _check_alike(modules[0], module, k)


def kept_members(indices: Sequence[int], members: int) -> list[int]:
    """Return the indices of the members that stay, of so many.

    Raises
    ------
    MemberError
        If there is none, one stands twice or does not exist.

    """
    kept = [int(index) for index in indices]
    if not kept or len(set(kept)) != len(kept) or not set(kept) <= set(range(members)):
        raise MemberError(f"keep needs different members of 0 to {members - 1}, got {kept}")
    return kept


def changed_settings(module: nn.Module, other: nn.Module) -> list[str]:
    """Paths of what two modules of one structure hold besides tensors and modules, and hold differently."""
    ours, theirs = _settings(module), _settings(other)
    comparison = Comparison(_counterparts(module, other))
    return [path for path in {**ours, **theirs} if not comparison.alike(ours.get(path), theirs.get(path))]


def _counterparts(first: nn.Module, other: nn.Module) -> Iterator[tuple[object, object]]:
    yield from zip(first.modules(), other.modules(), strict=False)
    ours, theirs = tensors_of(first), tensors_of(other)
    yield from ((ours[path], theirs[path]) for path in ours if path in theirs)


def _check_alike(first: nn.Module, other: nn.Module, k: int) -> None:
    comparison = Comparison(_counterparts(first, other))
    for what, of in _FACTS:
        ours, theirs = of(first), of(other)
        for path in [*ours, *(path for path in theirs if path not in ours)]:
            a, b = ours.get(path, "absent"), theirs.get(path, "absent")
            if not comparison.alike(a, b):
                raise MemberError(
                    f"members 0 and {k} differ in {what} of {path or 'the module itself'}: {a} and {b}."
                    " Members of one ensemble are alike in all but the values of their tensors."
                )


def _classes(module: nn.Module) -> dict[str, Any]:
    return {path: class_name(m) for path, m in module.named_modules(remove_duplicate=False)}


def _modes(module: nn.Module) -> dict[str, Any]:
    return {path: "train" if m.training else "eval" for path, m in module.named_modules()}


def _kinds(module: nn.Module) -> dict[str, Any]:
    return {
        path: f"{tuple(t.shape)} {t.dtype} {t.device}{'' if t.requires_grad else ' without gradient'}"
        for path, t in _all_names(module)
    }


def _ties(module: nn.Module) -> dict[str, Any]:
    first: dict[int, str] = {}
    return {path: first.setdefault(id(t), path) for path, t in _all_names(module)}


def _all_names(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from module.named_parameters(remove_duplicate=False)
    yield from module.named_buffers(remove_duplicate=False)


def _settings(module: nn.Module) -> dict[str, Any]:
    """Return what modules hold besides parameters, buffers and modules, by path."""
    return {
        f"{path}.{name}".lstrip("."): len(value) if "hooks" in name else value
        for path, m in module.named_modules()
        for name, value in vars(m).items()
        if name not in _NO_SETTINGS
    }


_EVERY_MODULES = frozenset(vars(nn.Module()))
_NO_SETTINGS = {name for name in _EVERY_MODULES if "hooks" not in name}
_NO_SETTINGS |= {
    "_flat_weights",
    "_flat_weight_refs",
}  # the parameters again, which `nn.LSTM` keeps up to date


_FACTS: tuple[tuple[str, Callable[[nn.Module], dict[str, Any]]], ...] = (
    ("the class", _classes),
    ("the shape, dtype, device or gradient", _kinds),
    ("the tied name", _ties),
    ("the mode", _modes),
    ("the setting", _settings),
)
