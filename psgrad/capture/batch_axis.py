"""Whether the batch is to be seen in what a model is given and returns: axis 0 of its first tensor."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch._C._functorch import peek_interpreter_stack
from torch.utils._pytree import tree_leaves

from psgrad.capture.region import is_ragged
from psgrad.capture.stand_in import StandIn
from psgrad.capture.survey import Layer, OtherRowsError
from psgrad.errors import CaptureError, ShapeError

__all__ = ["check_layer_rows", "check_rows", "refuse_transformed", "refuse_unseen"]


def check_layer_rows(layer: Layer, x: Tensor, rows_per_sample: int, expected: int | None) -> None:
    """Raise where a layer's input has not the batch in axis 0.

    Parameters
    ----------
    layer
        With a rule.
    x
        Its input.
    rows_per_sample
        K.
    expected
        N K of the model's batch; None where the layer was called by itself.

    Raises
    ------
    ShapeError
        If the layer takes no such input.
    OtherRowsError
        If it does, but not for the batch.
    PsgradError
        What the module raises that it is a stand-in of.

    """
    assert layer.rule is not None
    if isinstance(x, StandIn):
        x.run.refuse(x, f"{layer} got a parameter that no row of the batch has met")
    error = layer.rule.input_error(layer.module, x)
    if error is not None:
        raise ShapeError(f"{layer}: {error}; got {tuple(x.shape)}")
    rows = x.shape[0]
    if rows % rows_per_sample or expected not in (None, rows):
        wanted = "rows" if expected is None else f"{expected} rows"
        raise OtherRowsError(
            layer,
            f"called with {rows} rows, {tuple(x.shape)}: axis 0 must be the batch of the "
            f"model's input, {wanted} with rows_per_sample={rows_per_sample}",
        )


def refuse_unseen(args: Any, kwargs: Any) -> None:
    """Raise where inputs are of types whose tensors, or rows, nobody here can see.

    Raises
    ------
    CaptureError
        Naming them.

    """
    plain = (Tensor, str, bytes, int, float, complex, type(None), torch.dtype, torch.device)
    leaves = tree_leaves((args, kwargs), is_leaf=is_ragged)
    unseen = {
        "nested tensor" if isinstance(leaf, Tensor) else type(leaf).__name__
        for leaf in leaves
        if is_ragged(leaf) or not isinstance(leaf, plain)
    }
    if unseen:
        raise CaptureError(
            f"no rows are to be seen in the model's inputs of type {', '.join(sorted(unseen))}: which "
            "are a sample's cannot be told. Call the model with tensors, or with dicts, lists or tuples of "
            "them (model(**batch)), or register the type with torch.utils._pytree; pad a PackedSequence "
            "(pad_packed_sequence), or a nested tensor (to_padded_tensor)"
        )


def refuse_transformed(layer: Layer, regions: Iterable[str]) -> NoReturn:
    """Say whose transform made what a layer was given outside of a region: one of these, or the user's.

    Raises
    ------
    CaptureError
        As said.

    """
    if peek_interpreter_stack() is not None:
        raise CaptureError(
            f"{layer} was called under torch.func.grad, jacrev, jvp or under torch.vmap while psgrad is "
            "attached, which takes axis 0 of what the model is given for samples, and waits for backward. "
            "Call the model on the whole batch, take gradients by autograd, or remove() the handle first"
        )
    raise CaptureError(
        f"{layer} was called again for a module that runs one sample at a time (one of "
        f"{', '.join(map(repr, regions))}) after that had ended. If torch.utils.checkpoint calls it: put the "
        "checkpoint around that module, not inside of it."
    )


def check_rows(out: Any, rows: int, args: Any, kwargs: Any) -> None:
    """Raise where a model that ran one sample at a time returned nothing with the batch in axis 0.

    Raises
    ------
    CaptureError
        Saying what was taken for the batch.

    """
    shapes = [tuple(t.shape) for t in tree_leaves(out) if isinstance(t, Tensor)]
    if shapes and all(shape[:1] != (rows,) for shape in shapes):
        inputs = [tuple(t.shape) for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        raise CaptureError(
            f"the model runs one sample at a time, and returned {shapes[0]} for a batch of {rows} rows. The "
            f"batch is axis 0 of the first tensor among its inputs, which are {', '.join(map(str, inputs))}: "
            "let the batch come first, and return what has it in axis 0"
        )
