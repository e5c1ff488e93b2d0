"""The graph of one member's forward pass, or why there is none that can be relied on.

The member is traced with `torch.fx` on the meta device: whatever reads a value of a parameter or buffer while
tracing, which would become a constant of the graph, fails there instead of being frozen in silence.
"""

from __future__ import annotations

import copy
import operator
from collections.abc import Callable, Hashable
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.modules.module import _has_any_global_hook
from torch.utils._pytree import TreeSpec, tree_flatten

from psgrad.ensemble.functions import IN_PLACE, is_fact
from psgrad.ensemble.members import tensors_of
from psgrad.ensemble.randomness import GlobalStates

__all__ = ["is_altered", "is_in_place", "settings_key", "trace_key", "trace_member"]

_ROOT = "member"


class _One(nn.Module):
    """Returns the leaves of what the member returns: in a graph, dicts and lists are of other types."""

    spec: TreeSpec

    def __init__(self, member: nn.Module) -> None:
        super().__init__()
        self.member = member

    def forward(self, a: Any) -> Any:
        return self._flat(self.member(a))

    def _flat(self, returned: Any) -> list[Any]:
        leaves, self.spec = tree_flatten(returned)
        return leaves


class _Two(_One):
    def forward(self, a: Any, b: Any) -> Any:  # type: ignore[override]  # by its inputs
        return self._flat(self.member(a, b))


class _Three(_One):
    def forward(self, a: Any, b: Any, c: Any) -> Any:  # type: ignore[override]  # by its inputs
        return self._flat(self.member(a, b, c))


_CALLS: dict[int, type[_One]] = {1: _One, 2: _Two, 3: _Three}


def trace_key(stacked: nn.Module) -> Hashable:
    """What the graph of a module depends on besides inputs and settings: modes, hooks, what is trained."""
    key: list[Any] = [_switches()]
    for module in _modules(stacked):
        trained = [p is not None and p.requires_grad for p in module._parameters.values()]
        key.append((module.training, is_altered(module), *trained))
    return tuple(key)


def settings_key(stacked: nn.Module) -> Hashable:
    """Only the user's own settings."""
    seen: set[int] = set()
    return tuple(
        [
            (name, value if isinstance(value, _SCALARS) else _plain(value, seen))
            for module in _modules(stacked)
            if not type(module).__module__.startswith("torch.nn.")
            for name, value in module.__dict__.items()
            if name not in _EVERY_MODULES
        ]
    )


def _modules(root: nn.Module) -> list[nn.Module]:
    """As `root.modules()`, in another order, and without a generator a level: keys are made every step."""
    found, pending = {root: None}, [root]
    while pending:
        for child in pending.pop()._modules.values():
            if child is not None and child not in found:
                found[child] = None
                pending.append(child)
    return list(found)


_SCALARS = (bool, int, float, str, type(None))
_EVERY_MODULES = frozenset(vars(nn.Module()))
_MOST = 1000  # what a longer container holds is looked at no more: it would cost every step
_DEEPEST = 3  # objects in objects


def _plain(value: Any, seen: set[int], depth: int = 1) -> Hashable:
    """What a setting consists of, the first time that it is seen: containers, objects, what is itself."""
    if isinstance(value, _SCALARS):
        return value
    if isinstance(value, nn.Module | Tensor) or id(value) in seen:
        return None
    seen.add(id(value))
    if isinstance(value, dict | list | tuple | set):
        parts = [*value, *value.values()] if isinstance(value, dict) else value
        return tuple([_plain(part, seen, depth) for part in parts]) if len(value) <= _MOST else None
    held: Hashable = None
    if depth <= _DEEPEST and not isinstance(value, type | ModuleType):
        held = _plain(getattr(value, "__dict__", None), seen, depth + 1)
    try:
        hash(value)
    except TypeError:  # then it is only what it holds
        return (held,)
    return held, value


class _Proxy(fx.Proxy):
    """Keeps `x += y`, which fx's own takes for `x = x + y`: other names of x would not see it."""

    def __setattr__(self, name: str, value: Any) -> None:
        if name not in ("tracer", "node"):  # its own
            raise RuntimeError(f"forward sets {name} of a tensor")
        super().__setattr__(name, value)


def _recorded(change: Callable[..., Any]) -> Callable[[fx.Proxy, Any], fx.Proxy]:
    def method(self: fx.Proxy, other: Any) -> fx.Proxy:
        return self.tracer.create_proxy("call_function", change, (self, other), {})

    return method


_OPERATORS = frozenset(
    {
        "iadd", "iand", "ifloordiv", "ilshift", "imatmul", "imod", "imul", "ior", "ipow", "irshift", "isub",
        "itruediv", "ixor",
    }
)  # fmt: skip  # one a line is a page

for _name in _OPERATORS:
    setattr(_Proxy, f"__{_name}__", _recorded(getattr(operator, _name)))


class _Tracer(fx.Tracer):
    """Stops where gradients or autocast are switched inside of forward, which a graph does not hold."""

    def __init__(self) -> None:
        super().__init__()
        self._switches = _switches()

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return _Proxy(node, self)

    def create_node(self, *args: Any, **kwargs: Any) -> fx.Node:
        if _switches() != self._switches:
            raise RuntimeError("gradients or autocast are switched inside of forward")
        return super().create_node(*args, **kwargs)


def _switches() -> tuple[bool, ...]:
    autocast = torch.is_autocast_enabled("cpu"), torch.is_autocast_enabled()
    return torch.is_grad_enabled(), *autocast, bool(_has_any_global_hook())


def trace_member(stacked: nn.Module, inputs: int) -> tuple[fx.Graph, TreeSpec] | str:
    """Return the graph of a member called with so many tensors, or why it cannot be relied on.

    Module and attribute targets are paths in `stacked`. It returns a list, the leaves of the tree beside it.
    """
    if inputs not in _CALLS:
        return f"a member with {inputs} inputs"
    if _has_any_global_hook():
        return "there are hooks of all modules"
    for path, module in stacked.named_modules():
        if is_altered(module):
            return f"{path or 'the module itself'} has hooks, or a forward of its own"
        if hasattr(module, "parametrizations"):
            return f"{path or 'the module itself'} is parametrized"
    member = _on_meta(stacked)
    tensors = tensors_of(member)
    before = {path: tensor._version for path, tensor in tensors.items()}
    states = GlobalStates()
    try:
        called = _CALLS[inputs](member)
        graph = _Tracer().trace(called)
    except Exception as error:  # whatever the user's forward raises on proxies
        return (
            f"torch.fx cannot trace it: {str(error).splitlines()[0] if str(error) else type(error).__name__}"
        )
    finally:
        drew = states.put_back()
    if drew:
        return "forward draws random numbers of its own"
    for path, tensor in tensors_of(member).items():
        if tensor is not tensors.get(path) or tensor._version != before[path]:
            return f"forward changes {path} itself"
    names = {n for n, _ in stacked.named_parameters(remove_duplicate=False)}
    names |= {n for n, _ in stacked.named_buffers(remove_duplicate=False)}
    for node in graph.nodes:
        if node.op in ("call_module", "get_attr"):
            node.target = node.target.removeprefix(_ROOT).removeprefix(".")
        if node.op == "get_attr" and node.target not in names:
            return "forward makes a tensor that depends on no input"
    return _in_place_refusal(graph, member) or (graph, called.spec)


def is_in_place(node: fx.Node, root: nn.Module) -> bool:
    """Whether the node changes its first argument."""
    if node.op == "call_module":
        return bool(getattr(root.get_submodule(node.target), "inplace", False))  # type: ignore[arg-type]  # a path
    return node.target in IN_PLACE or bool(node.kwargs.get("inplace", False))


def _in_place_refusal(graph: fx.Graph, member: nn.Module) -> str | None:
    """Why an in-place change might be seen through another name; None if it cannot.

    The interpreter computes out of place and renames, which is the same as long as nobody who looks later
    holds a *view* of what changed.
    """
    order = {node: i for i, node in enumerate(graph.nodes)}
    for node in graph.nodes:
        if node.op not in ("call_function", "call_method", "call_module"):
            continue
        name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
        in_place = is_in_place(node, member)
        if node.op != "call_module" and not in_place and _looks_in_place(name):
            return f"the in-place {name} has no rule"
        if node.kwargs.get("out") is not None:
            return f"{name} writes into out="
        if not in_place:
            continue
        changed = node.args[0] if node.args else None
        if not isinstance(changed, fx.Node) or changed.op == "get_attr":
            return f"the in-place {name} changes what is no value of the graph"
        for other in _related(changed, member) - _same_object(changed, member) - {node}:
            # what was made later sees the new value
            if order[other] < order[node] and any(order[user] > order[node] for user in other.users):
                return f"{other.name} may be a view of what the in-place {name} changes, and is used later"
    return None


def _looks_in_place(name: str) -> bool:
    if name in ("and_", "or_"):  # x & y and x | y, which are Python's words without it
        return False
    dunder = name.startswith("__")
    return (name.endswith("_") and not dunder) or name in _OPERATORS or name in ("setitem", "__setitem__")


def _same_object(node: fx.Node, member: nn.Module) -> set[fx.Node]:
    """Nodes that are the same tensor: chains of in-place changes."""
    same, pending = {node}, [node]
    while pending:
        current = pending.pop()
        near = [
            user
            for user in current.users
            if user.args and user.args[0] is current and is_in_place(user, member)
        ]
        if current.op.startswith("call") and is_in_place(current, member):
            near += [argument for argument in current.args[:1] if isinstance(argument, fx.Node)]
        pending += [other for other in near if other not in same]
        same.update(near)
    return same


def _related(node: fx.Node, member: nn.Module) -> set[fx.Node]:
    """Nodes that may share storage with one, over any chain of what is not known to make a new tensor."""
    related, pending = {node}, [node]
    while pending:
        current = pending.pop()
        near = [*_sources(current, member), *(u for u in current.users if current in _sources(u, member))]
        pending += [other for other in near if other not in related]
        related.update(near)
    return related


def _sources(node: fx.Node, member: nn.Module) -> list[fx.Node]:
    """Inputs that the node's result may share storage with."""
    if node.op != "output" and is_in_place(node, member):
        return [argument for argument in node.args[:1] if isinstance(argument, fx.Node)]
    return [] if _is_fresh(node, member) else node.all_input_nodes


def _is_fresh(node: fx.Node, member: nn.Module) -> bool:
    """Whether the node, not in place, makes a tensor that shares storage with none of its inputs."""
    if node.op in ("placeholder", "get_attr", "output") or is_fact(node):
        return True
    if node.op == "call_module":
        fresh = nn.Identity, nn.Flatten, nn.Unflatten, nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d
        module = member.get_submodule(node.target)  # type: ignore[arg-type]  # a path
        return type(module).__module__.startswith("torch.nn.") and not isinstance(module, fresh)
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
    return name in _FRESH


_FRESH = frozenset(
    {
        "add", "sub", "mul", "truediv", "div", "neg", "pow", "relu", "gelu", "silu", "hardswish",
        "hardsigmoid", "sigmoid", "tanh", "exp", "cat", "concat", "mean", "sum", "amax",
        "adaptive_avg_pool2d", "avg_pool2d", "max_pool2d", "_max_pool2d", "layer_norm",
        "batch_norm", "conv2d", "linear", "matmul", "bmm", "scaled_dot_product_attention",
        "softmax", "log_softmax", "clone", "size",
    }
)  # fmt: skip  # one a line is a page


def is_altered(module: nn.Module) -> bool:
    """Whether the module does something else than its class."""
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or "forward" in module.__dict__
    )


def _on_meta(stacked: nn.Module) -> nn.Module:
    memo: dict[int, Any] = {}
    with torch.inference_mode(False):  # inside of it tensors would have no version
        for tensor in tensors_of(stacked).values():
            own = torch.empty(tensor.shape[1:], dtype=tensor.dtype, device="meta")
            is_parameter = isinstance(tensor, nn.Parameter)
            memo[id(tensor)] = nn.Parameter(own, requires_grad=tensor.requires_grad) if is_parameter else own
    return copy.deepcopy(stacked, memo)
