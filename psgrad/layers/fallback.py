"""Any module at all: run under `torch.vmap`, with every sample its own copy of the parameters."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten

from psgrad.errors import RefusedModelError

__all__ = ["run_per_sample"]


def run_per_sample(
    path: str,
    module: nn.Module,
    wanted: tuple[str, ...],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    rows: int,
    rows_per_sample: int,
    anchor: Tensor,
    record: Callable[[nn.Parameter, Tensor], None],
) -> Any:
    """Run a module so that autograd itself computes its parameters' per-sample gradients.

    Each wanted parameter is expanded to `[N, *shape]` and the module runs under `torch.vmap` over N
    with K rows each. Autograd's gradient of the expanded parameter is the per-sample gradient.

    Parameters
    ----------
    path
        Of the module, for messages.
    module
        Any module whose forward `torch.vmap` can run.
    wanted
        Names of its parameters, children's included.
    args, kwargs
        Its inputs. Tensors with N K rows are split into samples; others are shared by all samples.
    rows
        N K.
    rows_per_sample
        K.
    anchor
        A scalar that requires grad.
    record
        Called in backward with a parameter and its `[N, *shape]` gradient.

    Returns
    -------
    Any
        What the module returns, every tensor with its N K rows in axis 0.

    Raises
    ------
    RefusedModelError
        If no input has N K rows, or `torch.vmap` cannot run the module; the reason is in the message.

    """
    samples = rows // rows_per_sample
    leaves, structure = tree_flatten((args, kwargs))
    batched = [i for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor) and leaf.shape[:1] == (rows,)]
    name = f"{path or 'the model itself'} ({type(module).__name__})"
    if not batched:
        raise RefusedModelError(f"{name} has trainable parameters but no input with {rows} rows")
    parameters = {key: module.get_parameter(key) for key in wanted}
    expanded = {
        key: _Expand.apply(p.detach(), samples, anchor, partial(record, p)) for key, p in parameters.items()
    }
    bare = _Bare(module)

    def one(params: dict[str, Tensor], *inputs: Tensor) -> Any:
        filled = list(leaves)
        for i, tensor in zip(batched, inputs, strict=True):
            filled[i] = tensor
        inner_args, inner_kwargs = tree_unflatten(filled, structure)
        swapped = {f"module.{key}": p for key, p in params.items()}
        return functional_call(bare, swapped, inner_args, inner_kwargs)

    out_leaves: list[Any] = []  # what the last sample returned: vmap passes tensors only
    out_spec: list[TreeSpec] = []

    def one_flat(params: dict[str, Tensor], *inputs: Tensor) -> list[Tensor]:
        out_leaves[:], spec = tree_flatten(one(params, *inputs))
        out_spec[:] = [spec]
        return [leaf for leaf in out_leaves if isinstance(leaf, Tensor)]

    if samples == 0:
        # vmap has nothing to run over; the sum over no samples ties the result to the expanded tensors.
        shared = {key: p.detach() + expanded[key].sum(0) for key, p in parameters.items()}
        return one(shared, *(leaves[i] for i in batched))
    split = [leaves[i].unflatten(0, (samples, rows_per_sample)) for i in batched]
    try:
        tensors = iter(torch.vmap(one_flat, randomness="different")(expanded, *split))
    except (RuntimeError, ValueError, TypeError, NotImplementedError) as err:
        raise RefusedModelError(
            f"{name} has no psgrad rule and torch.vmap could not run it one sample at a time: {err}\n"
            "Build it from layers that have a rule, use a sample-wise equivalent (opacus.layers has "
            "recurrent and attention layers), or freeze its parameters."
        ) from err
    filled = [next(tensors).flatten(0, 1) if isinstance(leaf, Tensor) else leaf for leaf in out_leaves]
    return tree_unflatten(filled, out_spec[0])


class _Bare(nn.Module):
    """Calls the class's own forward: no hooks, and nothing that shadows it on the instance."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return type(self.module).forward(self.module, *args, **kwargs)


class _Expand(torch.autograd.Function):
    """`[*shape] -> [N, *shape]`, whose backward hands the gradient over instead of summing it."""

    @staticmethod
    def forward(ctx: Any, p: Tensor, samples: int, anchor: Tensor, hand_over: Any) -> Tensor:
        ctx.set_materialize_grads(False)
        ctx.hand_over = hand_over
        return p.detach().expand(samples, *p.shape)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor | None) -> tuple[None, None, None, None]:
        if grad is not None:
            ctx.hand_over(grad)
        return None, None, None, None
