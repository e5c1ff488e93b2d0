"""Capture: a module's layers run so that `backward` hands over every parameter's contribution.

While a `Capture` is attached, each layer that owns trainable parameters runs as one autograd node
whose backward returns the gradient of the input only and hands (input, output gradient) over; the
ordinary weight gradient is not computed as well. In-place activations, residuals and any memory
layout are as free as without it, because the node's output is an ordinary tensor.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch._C._functorch import is_functorch_wrapped_tensor
from torch.nn.utils.parametrize import is_parametrized
from torch.utils.hooks import RemovableHandle

from psgrad.capture.batch_axis import check_layer_rows, check_rows, refuse_transformed, refuse_unseen
from psgrad.capture.captured_call import captured_call
from psgrad.capture.captured_modules import CapturedModules
from psgrad.capture.computed import Carried, Computed, Operand, Output
from psgrad.capture.contribution import Contribution, KeptGrads, LayerUse
from psgrad.capture.function_layers import FunctionLayers
from psgrad.capture.learning import Learning
from psgrad.capture.mixed import Batch, refuse_mixed
from psgrad.capture.owners import Owners
from psgrad.capture.parametrized import without_parametrizations
from psgrad.capture.recorder import (
    Consumer,
    ForwardCall,
    Recorder,
    frozen,
    leaves_for,
    not_captured,
    refuse_changed,
    trainable_of,
)
from psgrad.capture.region import Region, first_rows
from psgrad.capture.repeatable import RepeatableCall
from psgrad.capture.shadow import shadow_forward, unshadow_forward
from psgrad.capture.shared_rows import SharedRows
from psgrad.capture.stand_in import with_rows
from psgrad.capture.survey import (
    Layer,
    OtherRowsError,
    layers_of,
    refuse_mixing,
    refuse_model,
    why_hooked,
)
from psgrad.capture.synchronised import refuse_synchronised
from psgrad.errors import CaptureError, RefusedModelError, ShapeError
from psgrad.layers import LayerCall, LayerRule, why_samples_mix
from psgrad.loss import LossCheck
from psgrad.loss.starts import follow_inputs, unfollow_inputs
from psgrad.module_tables import ModuleTables

__all__ = ["Capture", "Consumer"]


class Capture:
    """Attach to `module` until `remove()` and tell `consumer` about every backward pass.

    Parameters
    ----------
    module
        Any module. It is changed in one way only: the `forward` of layers with trainable parameters, and
        of modules that must run one sample at a time, is shadowed on the instance. A copy
        (`copy.deepcopy`, pickle) is free of the capture. Frozen as a whole, it runs as without. Its first
        batch runs once more, in a trial with another number of samples, which tells the axis of the batch.
    consumer
        Is told.
    rows_per_sample
        K, the consecutive rows of the batch (axis 0 of every input) that make one sample.
    loss
        Looks at losses over what the module returns.
    repeatable
        Whether the consumer may call `again`. The module's graph is then apart from that of the loss, which
        only what the module returns may reach; it serves one backward pass.

    Raises
    ------
    RefusedModelError
        If samples would mix, if a layer has settings without per-sample gradients, if no parameter
        is trainable, or if a capture is attached already; all offenders are named.

    """

    def __init__(
        self,
        module: nn.Module,
        consumer: Consumer,
        rows_per_sample: int = 1,
        loss: LossCheck | None = None,
        *,
        repeatable: bool = False,
    ) -> None:
        if rows_per_sample < 1:
            raise ShapeError(f"rows_per_sample must be at least 1, got {rows_per_sample}")
        self._module = module
        self.anchor = torch.zeros((), requires_grad=True)
        """The leaf that every captured node leads to, part of the graph where nothing else requires grad."""
        self._recorder = Recorder(consumer, self._check_trainable, self.anchor)
        self._rows_per_sample = rows_per_sample
        self._loss = loss
        self._root_rows: int | None = None
        self._repeatable = repeatable
        self._call: RepeatableCall | None = None
        self._learned = False  # all that batches tell
        layers = layers_of(module)
        refuse_model(module, layers)
        self._trainable = trainable_of(module)
        self._remember()
        self._owners = {p: name.rpartition(".")[0] for name, p in self._trainable.items()}
        self._functions = FunctionLayers(self._owners)
        self._learning = Learning(module, self._owners, rows_per_sample, self._widen, self._enclose)
        self._own = Owners(self._learning, rows_per_sample, self._recording, self._run_function, self.anchor)
        self._shared = SharedRows(self._own.direct)
        self._handles: list[RemovableHandle] = [
            p.register_post_accumulate_grad_hook(not_captured(name)) for name, p in self._trainable.items()
        ]
        self._layers = CapturedModules(module, self._run_layer, layers)
        shadow_forward(module, self._run_root)
        follow_inputs(self)
        if loss is not None:
            loss.watch()

    @property
    def trainable(self) -> dict[str, nn.Parameter]:
        """The module's trainable parameters by path, each once; other ones than at first are refused."""
        return self._trainable

    def leaves_for(self, inputs: Sequence[Any]) -> Sequence[Tensor]:
        """See `psgrad.loss.starts.Leads`."""
        return leaves_for(inputs, self._trainable, [self.anchor])

    gradients_per_sample, sample_axis = 1, 0
    """See `psgrad.capture.attach.Attached`."""

    @property
    def regions(self) -> dict[str, str]:
        """By path, the modules that run one sample at a time, and why; before a batch, all that may be."""
        return self._layers.regions(self._own)

    def again(self, take: Callable[[Contribution], None], *, keep: bool) -> None:
        """Run the module's backward once more, from the same gradients; for a repeatable one's consumer.

        To be called while it finishes. What layers contribute goes to `take`. Forward hooks do not run again,
        backward hooks inside of the module do.

        Parameters
        ----------
        take
            Is told every contribution.
        keep
            Whether it can be run yet once more; if not, what forward saved is freed on the way.

        Raises
        ------
        ConfigError
            If a layer was called by itself, which cannot be repeated.

        """
        self._recorder.again(take, [self.anchor, *self._trainable.values()], keep=keep)

    def no_more(self) -> None:
        """Let go of what forward saved: nobody will ask for `again`."""
        self._recorder.end_calls()

    def remove(self) -> None:
        """Give the module back as it was. Twice is as good as once."""
        self._recorder.forget_failed()
        unfollow_inputs(self)
        if self._loss is not None:
            self._loss.unwatch()
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._layers.remove()
        unshadow_forward(self._module)

    def _run_root(self, forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """Run the whole module, knowing how many rows its batch has."""
        if frozen(self._module, self._trainable):
            return forward(*args, **kwargs)
        rows = first_rows(args, kwargs)
        self._functions.forget()
        if torch.is_grad_enabled():
            self._refuse_mixing()
            self._check_trainable()
            if rows is None:
                refuse_unseen(args, kwargs)
            if rows and rows % self._rows_per_sample == 0:
                out = (self._run_batch if self._learned else self._learn_and_run)(forward, args, kwargs, rows)
                if self._loss is not None:
                    self._loss.mark(out, rows // self._rows_per_sample, rows)
                return out
        return self._run_batch(forward, args, kwargs, rows)

    def _learn_and_run(self, forward: Callable[..., Any], args: Any, kwargs: Any, rows: int) -> Any:
        """Run some samples, then all.

        Raises
        ------
        RefusedModelError
            If the model mixes samples. A batch of one cannot tell; then the next is asked.
        CaptureError
            If only all samples work.

        """
        failed = None
        run = partial(self._run_rows, forward)
        try:
            if not self._learning.done:
                self._learning.learn(run, args, kwargs, rows)
        except RefusedModelError:
            raise
        except Exception as error:  # whatever else a model may raise
            failed = error
        else:
            if rows > self._rows_per_sample:
                batch = Batch((args, kwargs), rows, self._rows_per_sample, self._learning.layout)
                tell = partial(self._own.run_and_tell, run)
                refuse_mixed(self._module, tell, batch, self._learning.of_samples)
                self._learned = True
        out = self._run_batch(forward, args, kwargs, rows)
        if failed is not None:
            raise CaptureError(
                f"the model runs on {rows} rows, but not on fewer or more ({type(failed).__name__}: "
                f"{failed}). Its first batch runs with another number of samples, to tell the axis of the "
                "batch from others as long; let the model take a batch of any size."
            ) from failed
        return out

    def _run_batch(self, forward: Callable[..., Any], args: Any, kwargs: Any, rows: int | None) -> Any:
        """Run all rows, in a graph apart where its backward may have to run again."""
        if not (self._repeatable and torch.is_grad_enabled()) or self._call is not None:
            return self._run_rows(forward, args, kwargs, rows)
        self._call = RepeatableCall(self._recorder.reached, self.anchor)
        try:
            return self._call.run(
                lambda *args, **kwargs: self._run_rows(forward, args, kwargs, rows), args, kwargs
            )
        finally:
            self._call = None

    def _run_rows(self, forward: Callable[..., Any], args: Any, kwargs: Any, rows: int | None) -> Any:
        before, self._root_rows = self._root_rows, rows
        run = partial(self._run_model, forward, args, kwargs)
        try:
            while True:
                try:
                    out = self._shared.run(self._module, (args, kwargs), rows, run)
                    if self._layers.model and rows and torch.is_grad_enabled() and self._own.is_region(""):
                        check_rows(out, rows, args, kwargs)
                    return out
                except OtherRowsError as error:
                    if self._widen(error.layer.path, str(error)) is None:
                        raise
        finally:
            self._root_rows = before  # a submodule called on its own may have another batch

    def _run_model(self, forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        root = self._layers.model
        return self._run_layer(root, forward, args, kwargs) if root else forward(*args, **kwargs)

    def _widen(self, path: str, why: str) -> Layer | None:
        return self._layers.widen(path, self._own, why)

    def _enclose(self, path: str, why: str) -> Layer | None:
        return self._layers.enclose(path, self._own, why)

    def _run_layer(self, layer: Layer, forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """Run one layer, captured if gradients are being recorded.

        Raises
        ------
        ShapeError
            If axis 0 of the layer's input cannot be the batch.
        OtherRowsError
            If it has not the batch's rows.
        CaptureError
            If it is called under a transform of torch.func that is not the present region's vmap.

        """
        if not torch.is_grad_enabled() or self._own.as_it_is or not layer.trains:
            return forward(*args, **kwargs)
        self._recorder.forget_failed()
        args, kwargs = with_rows(args, kwargs)
        region = self._own.region
        if region is None and self._root_rows is None:  # called by itself, not by the model's call
            self._refuse_mixing()
        if region is None and any(
            isinstance(t, Tensor) and is_functorch_wrapped_tensor(t) for t in (*args, *kwargs.values())
        ):
            refuse_transformed(layer, self.regions)
        if layer.rule is None:
            return self._own.run(layer, forward, args, kwargs, self._root_rows)
        if region is not None and region.samples == 0:
            return forward(*args, **kwargs)
        x, *rest = args if args else (kwargs["input"],)
        rest += [value for name, value in kwargs.items() if name != "input"]
        if region is not None:
            return self._run_rule_in_region(region, layer, layer.rule, x, rest)
        if self._shared.has(layer, x, trying=self._learning.trying):
            run = partial(self._run_rule, layer, layer.rule, rest=rest, rows_per_sample=1)
            return self._shared.look_up(layer, run, x, self._rows_per_sample)
        check_layer_rows(layer, x, self._rows_per_sample, self._root_rows)
        self._own.tell(layer, x)
        return self._run_rule(layer, layer.rule, x, rest, self._rows_per_sample)

    def _run_rule_in_region(
        self, region: Region, layer: Layer, rule: LayerRule, x: Tensor, rest: list[Any]
    ) -> Tensor:
        """Run a layer on all samples at once: all rows of x are one sample's, or x is itself a row."""
        error = partial(rule.input_error, layer.module)
        return region.layer(str(layer), lambda x, rows: self._run_rule(layer, rule, x, rest, rows), error, x)

    def _run_function(
        self, rule: LayerRule, settings: nn.Module, weight: Operand, bias: Operand, x: Tensor
    ) -> Tensor:
        """Run what a module computes by `torch.nn.functional` as a layer; see `Use`."""
        layer, computed = self._functions.of(rule, settings, weight, bias)
        if (region := self._own.region) is None:
            return self._run_rule(layer, rule, x, [], self._rows_per_sample, computed)
        return self._run_rule_in_region(region, layer, rule, x, [])

    def _run_rule(
        self,
        layer: Layer,
        rule: LayerRule,
        x: Tensor,
        rest: list[Any],
        rows_per_sample: int,
        computed: Computed | None = None,
    ) -> Tensor:
        gate, this = None if self._call is None else self._call.gate, ForwardCall()
        if is_parametrized(layer.module):
            computed = without_parametrizations(layer.module)
            layer = Layer(layer.path, computed.layer, rule)

        def record(x: Tensor, g: Tensor, *saved: Tensor) -> None:
            call = LayerCall(layer.module, x, g, rows_per_sample, layer.wanted, saved)
            use = LayerUse(layer.path, rule, call)
            whole = use if computed is None else Carried(layer.path, computed, use, output)
            self._recorder.record(whole, this, gate)

        output, out = Output(), captured_call(record, layer, rule, rest, self.anchor, x)
        if computed is None:
            return out
        return output.of(out, computed, rule, LayerCall(layer.module, x, out, rows_per_sample, layer.wanted))

    def _recording(self) -> Callable[[nn.Parameter, Tensor], None]:
        """Return what records a parameter's written-out gradient, `[N, *shape]`, in backward."""
        gate = None if self._call is None else self._call.gate
        calls = defaultdict[nn.Parameter, ForwardCall](ForwardCall)

        def record(p: nn.Parameter, grads: Tensor) -> None:
            written = KeptGrads(self._owners[p], {p: grads}, grads.shape[0])
            self._recorder.record(written, calls[p], gate)

        return record

    def _remember(self) -> None:
        """Take what the module consists of now for what it has been seen to consist of."""
        self._tables = ModuleTables(self._module)
        self._parameters = list(self._module.parameters())
        self._trained = [p.requires_grad for p in self._parameters]

    def _check_trainable(self) -> None:
        if not self._tables.hold() or [p.requires_grad for p in self._parameters] != self._trained:
            refuse_changed(self._trainable, trainable_of(self._module))
            self._remember()
        if hooked := [f"{name}: {why}" for name, p in self._trainable.items() if (why := why_hooked(p))]:
            raise CaptureError("since psgrad was attached:\n  " + "\n  ".join(hooked))

    def _refuse_mixing(self) -> None:
        refuse_synchronised()
        if not self._tables.hold() or any(map(why_samples_mix, self._tables.modules)):
            refuse_mixing(self._module)
