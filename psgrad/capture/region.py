"""A region: a module that runs one sample at a time under `torch.vmap`, while its layers leave the vmap.

Inside a region every parameter is each sample's own copy, so that whatever is done with it has a per-sample
gradient, and whatever order the rows of an inner tensor have, they are one sample's rows. What has a rule
is run outside of the vmap, on all samples at once.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._C._functorch import (
    _add_batch_dim,
    _unwrap_batched,
    is_batchedtensor,
    maybe_current_level,
    peek_interpreter_stack,
)
from torch._functorch.pyfunctorch import temporarily_pop_interpreter_stack
from torch.nn.utils.rnn import PackedSequence
from torch.utils._pytree import TreeSpec, tree_flatten, tree_leaves, tree_unflatten

from psgrad.capture.copies import Record, Use, own_copies
from psgrad.capture.functions import bound
from psgrad.capture.intercept import Intercept
from psgrad.capture.swap import shown, swapped
from psgrad.errors import CaptureError, PsgradError, RefusedModelError, ShapeError

__all__ = ["Region", "first_rows", "is_ragged"]

LAST_AXIS = (F.linear, F.layer_norm)
"""Functions whose bias is along the last axis of the result."""


class Region:
    """One run of a module, sample by sample.

    Parameters
    ----------
    name, why
        Of the module, and why it is not run as a whole, for messages.
    module
        Any module whose forward `torch.vmap` can run, with every layer that has a rule called through
        `outside`.
    record
        Called in backward with a parameter and its `[N, *shape]` gradient, once per region.
    use
        See `Use`; of an input in the region.
    anchor
        A scalar that requires grad.

    """

    def __init__(
        self, name: str, why: str, module: nn.Module, record: Record, use: Use, anchor: Tensor
    ) -> None:
        self._name = name
        self._why = why
        self._module = module
        self._record = record
        self._use = use
        self._anchor = anchor
        self._level: int | None = None  # of the vmap
        self._copies: dict[nn.Parameter, Tensor] = {}
        self._originals: dict[int, nn.Parameter] = {}
        self.samples = 0

    def run(
        self,
        forward: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        batched: Collection[int],
        rows: int,
        rows_per_sample: int,
    ) -> Any:
        """Run the module's `forward`.

        Parameters
        ----------
        forward
            Of the module.
        args, kwargs
            Its inputs, shared by all samples but for those that are `batched`.
        batched
            Which of their leaves (`torch.utils._pytree`) have N K rows in axis 0, to be split into samples.
        rows
            N K.
        rows_per_sample
            K.

        Returns
        -------
        Any
            What the module returns, every tensor with its N K rows in axis 0.

        Raises
        ------
        RefusedModelError
            If `torch.vmap` cannot run the module; the reason is in the message.
        CaptureError
            If it returns a number for the whole batch.
        PsgradError
            What a layer inside of the module raises.

        """
        self.samples = rows // rows_per_sample
        leaves, structure = tree_flatten((args, kwargs))
        if self.samples == 0:
            with swapped(self._module.modules(), self._copy):
                return forward(*args, **kwargs)
        out_leaves: list[Any] = []  # what the last sample returned: vmap passes tensors only
        out_spec: list[TreeSpec] = []

        def one(*inputs: Tensor) -> list[Tensor]:
            self._level = maybe_current_level()
            filled = list(leaves)
            for i, tensor in zip(batched, inputs, strict=True):
                filled[i] = tensor
            inner_args, inner_kwargs = tree_unflatten(filled, structure)
            with swapped(shown(self._module), self._copy), Intercept(self):
                out_leaves[:], spec = tree_flatten(forward(*inner_args, **inner_kwargs))
            out_spec[:] = [spec]
            return [leaf for leaf in out_leaves if isinstance(leaf, Tensor)]

        split = [leaves[i].unflatten(0, (self.samples, rows_per_sample)) for i in batched]
        try:
            tensors = iter(torch.vmap(one, randomness="different")(*split))
        except PsgradError:
            raise
        except (RuntimeError, ValueError, TypeError, NotImplementedError) as err:
            raise RefusedModelError(
                f"{self._name} has to run one sample at a time, and torch.vmap could not: {err}\n"
                f"It has to because: {self._why}.\n"
                "Build it from layers that have a rule, or freeze its parameters."
            ) from err
        finally:
            self._copies.clear()
            self._originals.clear()
        if any(isinstance(leaf, Tensor) and leaf.ndim == 0 for leaf in out_leaves):
            raise CaptureError(f"{self._name} runs one sample at a time, and returned one number for all")
        filled = [next(tensors).flatten(0, 1) if isinstance(leaf, Tensor) else leaf for leaf in out_leaves]
        return tree_unflatten(filled, out_spec[0])

    def outside(self, function: Callable[..., Tensor], *tensors: Tensor) -> Tensor:
        """Call `function` outside of the vmap, on tensors with the samples in axis 0, as is its result.

        This is what the `vmap` of a `torch.autograd.Function` is for; done by hand, it costs a tenth.

        Raises
        ------
        CaptureError
            If the call comes from a vmap inside of the region, or from none.

        """
        interpreter = peek_interpreter_stack()
        if interpreter is None or interpreter.level() != self._level:
            where = "after its forward had ended" if interpreter is None else "from a torch.vmap inside of it"
            raise CaptureError(
                f"{self._name}: a layer was called {where}; psgrad runs this module one sample at a time, "
                "because it uses parameters of its own or calls layers on other rows than the batch's"
            )
        first = []
        for t in tensors:
            value, axis = _unwrap_batched(t, self._level)
            first.append(t.expand(self.samples, *t.shape) if axis is None else value.movedim(axis, 0))
        with temporarily_pop_interpreter_stack(), torch._C.DisableTorchFunction():
            out = function(*first)
        return _add_batch_dim(out, 0, self._level)

    def layer(
        self,
        name: str,
        run: Callable[[Tensor, int], Tensor],
        error: Callable[[Tensor], str | None],
        x: Tensor,
    ) -> Tensor:
        """Run a layer on all samples at once: all rows of x are one sample's, or x is itself a row.

        Parameters
        ----------
        name
            Of the layer, for messages.
        run
            Computes it from `[(N K), ..]` and K.
        error
            What is wrong with an input, seen as a batch, or None.
        x
            One sample's input.

        Raises
        ------
        ShapeError
            If it is neither.

        """

        def all_samples(x: Tensor) -> Tensor:
            if error(x[:1].flatten(0, 1) if x.ndim > 1 else x[0]) is None:
                return run(x.flatten(0, 1), x.shape[1]).unflatten(0, x.shape[:2])
            wrong = error(x)
            if wrong is not None:
                raise ShapeError(f"{name}: {wrong}; got {tuple(x.shape)}")
            return run(x, 1)

        return self.outside(all_samples, x)

    def _copy(self, p: nn.Parameter) -> Tensor:
        """Return every sample's own copy of a parameter."""
        if p not in self._copies:
            if self.samples:
                copy = self.outside(lambda: own_copies(self._record, p, self.samples, self._anchor))
            else:  # the sum over no samples ties the result to what records
                copy = p.detach() + own_copies(self._record, p, 0, self._anchor).sum(0)
            self._copies[p] = copy
            self._originals[id(copy)] = p
        return self._copies[p]

    def own(self, t: Tensor) -> Tensor:
        """Return every sample's own copy of a tensor: vmap writes no sample's values to a shared one."""
        if is_batchedtensor(t):
            return t
        samples = self.samples
        return self.outside(lambda: t.expand(samples, *t.shape).clone())

    def function(self, func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Tensor:
        """Compute one of `FUNCTIONS`, by its rule where the weight is a parameter as it is."""
        call = bound(func, args, kwargs)
        if isinstance(call, str) or id(call.weight) not in self._originals:
            return func(*args, **kwargs)
        bias = self._originals.get(id(call.bias))
        added = call.bias is not None and bias is None  # which is computed
        if added and func not in LAST_AXIS:
            return func(*args, **kwargs)
        out = self._use(call.rule, call.settings, self._originals[id(call.weight)], bias, call.x)
        return out + call.bias if added else out

    def attention(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        *args: Any,
        **kwargs: Any,
    ) -> Tensor:
        """Compute `F.scaled_dot_product_attention`, whose kernels vmap runs sample after sample."""
        compute: Callable[..., Tensor] = F.scaled_dot_product_attention

        def all_samples(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None) -> Tensor:
            # N..HLE -> (N..)HLE, the rank the kernels ask for
            leading = query.shape[: max(1, query.ndim - 3)]

            def fold(t: Tensor) -> Tensor:
                t = t.reshape(t.shape[0], *(1,) * (query.ndim - t.ndim), *t.shape[1:])
                return t.expand(*leading, *t.shape[len(leading) :]).flatten(0, len(leading) - 1)

            mask = None if mask is None else fold(mask)
            return compute(fold(query), fold(key), fold(value), mask, *args, **kwargs).unflatten(0, leading)

        masks = () if attn_mask is None else (attn_mask,)
        return self.outside(all_samples, query, key, value, *masks)


def first_rows(args: Any, kwargs: Any) -> int | None:
    """Return the rows of the first tensor that has any; None where an input holds samples of many lengths."""
    leaves = tree_leaves((args, kwargs), is_leaf=is_ragged)
    if any(map(is_ragged, leaves)):
        return None
    return next((leaf.shape[0] for leaf in leaves if isinstance(leaf, Tensor) and leaf.ndim), None)


def is_ragged(value: Any) -> bool:
    """Whether a value holds samples of several lengths, whose rows are to be seen in no axis."""
    return isinstance(value, PackedSequence) or (isinstance(value, Tensor) and value.is_nested)
