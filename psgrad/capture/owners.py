"""How a module runs that uses parameters itself: on the batch as a whole where that is safe, or apart."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence
from torch.utils._pytree import tree_flatten, tree_unflatten

from psgrad.capture.copies import Copies, Record, Use
from psgrad.capture.direct import Direct, UnknownUse, UnknownUseError, unknown_use
from psgrad.capture.functions import BY_OFFSETS
from psgrad.capture.learning import Learning, Run
from psgrad.capture.leaves import leaves_in
from psgrad.capture.once import refused
from psgrad.capture.recurrent import PACKED, run_packed
from psgrad.capture.region import Region, first_rows
from psgrad.capture.results import results_as_it_is, with_batch, without_batch
from psgrad.capture.survey import OPAQUE, Layer, OtherRowsError
from psgrad.errors import CaptureError, PsgradError, RefusedModelError, ShapeError
from psgrad.independence import check_samples_apart

__all__ = ["Owners"]

APART = (*OPAQUE, nn.RNN, nn.LSTM, nn.GRU)
"""Types of which it is known that samples stay apart in all they do but use their parameters."""

Told = list[tuple[str, Tensor]]

OTHER_ORDER = (
    "is given the samples of a batch in another order, or mixed: which row is whose cannot be told, though "
    "the model's results are apart. Sort, shuffle or flip the batch before the model."
)
MIXES = (
    "mixes samples: one's output moved when another was exchanged. It uses parameters of its own, or calls "
    "layers on other rows than the batch's, so that it would run one sample at a time. Compute over other "
    "axes than the batch (axis 0), in a recurrent network with batch_first=True; normalise with GroupNorm or "
    "LayerNorm, or use its eval() mode."
)
"""What is said of the one whose rows of one sample depend on another sample."""


class Owners:
    """Runs every module of a model that has trainable parameters and no rule.

    In the trials of the first batch it is tried on the batch as a whole (`psgrad.capture.direct`). It stays
    so if every use of its parameters is known to keep samples apart, and the values of its results say that
    what else it computes does too. All others run one sample at a time (`psgrad.capture.region`); as one that
    mixes samples would compute something else then, what each returns as it is is told as well.

    Parameters
    ----------
    learning
        What the first batch tells.
    rows_per_sample
        K.
    recording
        Returns what is to be called in backward with a parameter and its `[N, *shape]` gradient.
    use
        See `Use`.
    anchor
        A scalar that requires grad.

    Attributes
    ----------
    region
        The one that is running, if any.
    as_it_is
        Whether a module runs as without psgrad, to see what it returns.

    """

    def __init__(
        self,
        learning: Learning,
        rows_per_sample: int,
        recording: Callable[[], Record],
        use: Use,
        anchor: Tensor,
    ) -> None:
        self._learning = learning
        self._rows_per_sample = rows_per_sample
        self._recording = recording
        self._use = use
        self._anchor = anchor
        self._as_a_whole: dict[str, bool] = {}  # by path, once it is known
        self._why: dict[str, str] = {}  # by path, of those that are not
        self._inside = False  # of a module that is being tried, whose check looks at all inside of it
        self.region: Region | None = None
        self.as_it_is = False
        self._told: Told | None = None
        self._samples: Sequence[int] | None = None  # whose copies of parameters are told apart
        self._without_batch: dict[str, dict[int, torch.Size]] = {}  # results by region; see `_with_batch`

    def is_region(self, path: str) -> bool:
        """Whether the module runs one sample at a time, as far as is known."""
        return not self._as_a_whole.get(path, self._learning.trying)

    def is_told(self, path: str) -> bool:
        """Whether to tell that the module runs one sample at a time: if it has, or may have to."""
        return not self._as_a_whole.get(path, self._learning.done)

    def make_region(self, path: str, why: str) -> None:
        """Run the module one sample at a time from now on."""
        self._as_a_whole[path] = False
        self._why[path] = why

    def why(self, path: str) -> str:
        """Why the module runs one sample at a time, if it does."""
        return self._why.get(path, "no batch has told yet")

    def run_and_tell(
        self, run: Run, args: Any, kwargs: Any, rows: int, samples: Sequence[int]
    ) -> tuple[Any, Told]:
        """Run the whole model; return also what is taken for the batch, with what it would say of mixing.

        These are the inputs of layers, and what regions would return if they were none. Copies of parameters
        that meet the batch as a whole are told apart by the numbers of their `samples`.
        """
        told: Told = []
        self._told, self._samples = told, samples
        try:
            return run(args, kwargs, rows), told
        finally:
            self._told = self._samples = None

    def tell(self, where: object, t: Tensor, why: str = OTHER_ORDER) -> None:
        """Tell, if somebody listens, what is taken for the batch, and what it would say of mixing."""
        if self._told is not None:
            self._told.append((f"{where} {why}", t.detach()))

    def run(
        self, layer: Layer, forward: Callable[..., Any], args: Any, kwargs: Any, root_rows: int | None
    ) -> Any:
        """Run one; inside of a region it runs as it is.

        Parameters
        ----------
        layer
            The module.
        forward, args, kwargs
            Its call.
        root_rows
            N K of the model's batch, where the model was called.

        Raises
        ------
        ShapeError
            If the rows do not make whole samples.
        OtherRowsError
            If no input, or one of a layer inside, has not the batch's; or in a trial what it returns.
        RefusedModelError
            If that is the whole model, and a number; or if no rows of samples are to be seen.
        CaptureError
            If a later batch shows that samples may not stay apart, and the module has already written to its
            inputs.

        """
        if self.region is not None:
            return forward(*args, **kwargs)
        if isinstance(layer.module, nn.EmbeddingBag) and any(t.ndim == 1 for _, t in _tensors(args, kwargs)):
            raise RefusedModelError(f"{layer} {BY_OFFSETS}")
        rows = root_rows if root_rows is not None else first_rows(args, kwargs)
        if rows is None or rows % self._rows_per_sample:
            seen = "no input is a batch" if rows is None else f"{rows} rows"
            raise ShapeError(f"{layer}: {seen}, with rows_per_sample={self._rows_per_sample}")
        of_packed = _of_packed(layer, args)
        forward = of_packed or forward
        lengths = {} if of_packed else {i: t.shape[0] for i, t in _tensors(args, kwargs) if t.ndim}
        batched = self._learning.batched(layer.path, lengths, rows)
        if rows and not self.is_region(layer.path):
            run_whole = self._try_whole if self._learning.trying else self._run_whole
            why, out = run_whole(layer, forward, args, kwargs, rows)
            if why is None:
                self._learning.ran_whole(layer.path)
                return out
            self.make_region(layer.path, why)
        if of_packed:
            raise RefusedModelError(f"{layer} {PACKED}")
        if not batched:
            raise OtherRowsError(layer, f"no input has the batch's {rows} rows")
        for i, t in _tensors(args, kwargs):
            if i in batched:
                self.tell(layer, t)
        if rows and layer.path not in self._as_a_whole:
            self.make_region(layer.path, "the trials of the first batch did not come here")
        trying, asked = self._learning.trying, self._told is not None
        results = self._as_it_is(layer, forward, args, kwargs) if trying or asked else []
        self.region = Region(
            str(layer), self.why(layer.path), layer.module, self._recording(), self._use, self._anchor
        )
        try:
            out = self.region.run(forward, args, kwargs, batched, rows, self._rows_per_sample)
        finally:
            self.region = None
        if trying:
            self._without_batch[layer.path] = without_batch(results, out)
        for t in with_batch(results, out) if asked else ():
            self.tell(layer, t, MIXES)
        return self._with_batch(layer, out)

    def _as_it_is(self, layer: Layer, forward: Callable[..., Any], args: Any, kwargs: Any) -> list[Tensor]:
        """Return the tensors that a module returns which runs as without psgrad.

        Raises
        ------
        OtherRowsError
            If one is a number, that only a module around it can have for every sample.
        RefusedModelError
            If the module is the model.

        """
        self.as_it_is = True
        try:
            results = results_as_it_is(layer.module, forward, args, kwargs)
        finally:
            self.as_it_is = False
        number = any(t.ndim == 0 for t in results)
        if number and layer.path:
            raise OtherRowsError(layer, "returns a number for the whole batch")
        if number:
            raise RefusedModelError(
                f"{layer} has to run one sample at a time, as it uses parameters of its own or calls layers "
                "on other rows than the batch's, but it returns a number for the whole batch: let it return "
                "one for every sample, [N]"
            )
        return results

    def _with_batch(self, layer: Layer, out: Any) -> Any:
        """Return what a region returned; of the model, what has no batch in axis 0 may not reach the loss.

        Raises
        ------
        OtherRowsError
            If it is not the model: the module around it may be a region.

        """
        wrong = self._without_batch.get(layer.path)
        if not wrong:
            return out
        if layer.path:
            shape = tuple(next(iter(wrong.values())))
            raise OtherRowsError(layer, f"returns {shape}, which has not the batch's rows in axis 0")
        leaves, structure = tree_flatten(out)
        places = [i for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]
        for position, shape in wrong.items():
            leaves[places[position]] = refused(
                f"the loss uses a result {tuple(shape)} of the model, which has not the batch in axis 0 (a "
                "parameter, a penalty on one): of a model that runs one sample at a time, there are as many "
                "as samples. Compute that part of the loss for every sample, inside of forward.",
                leaves[places[position]],
            )
        return tree_unflatten(leaves, structure)

    def _try_whole(
        self, layer: Layer, forward: Callable[..., Any], args: Any, kwargs: Any, rows: int
    ) -> tuple[str | None, Any]:
        """Return why it is not known to be safe, None if it is, and what it returned.

        Raises
        ------
        OtherRowsError
            If a layer inside is given other rows than the batch's.

        """
        inside, known = self._inside, dict(self._as_a_whole)
        self._inside = True
        try:
            out = self.direct(rows).run(layer.module, forward, args, kwargs)
            known_apart = inside or known.get(layer.path) or type(layer.module) in APART
            if not known_apart and _tensors(args, kwargs):  # who is given none has no samples to mix
                check_samples_apart(layer.module, args, kwargs, rows, self._rows_per_sample)
        except Exception as error:  # whatever a module may raise that is given a stand-in, or other samples
            self._as_a_whole = known
            if isinstance(error, OtherRowsError):
                raise
            return _reason(error), None
        finally:
            self._inside = inside
        self._as_a_whole[layer.path] = True
        return None, out

    def _run_whole(
        self, layer: Layer, forward: Callable[..., Any], args: Any, kwargs: Any, rows: int
    ) -> tuple[str | None, Any]:
        """Return which use was not known, None if all were, and what it returned.

        Raises
        ------
        CaptureError
            If they were not, and the module's inputs are no longer what they were.

        """
        versions = [t._version for _, t in _tensors(args, kwargs)]
        try:
            return None, self.direct(rows).run(layer.module, forward, args, kwargs)
        except UnknownUseError as error:
            if versions == [t._version for _, t in _tensors(args, kwargs)]:
                return _reason(error), None
            raise CaptureError(
                f"{layer}: {error}. It did not on the first batch, and has written to its input before it "
                "came there: let the first batch take this branch, or copy the input."
            ) from error

    def direct(self, rows: int, error: UnknownUse = unknown_use) -> Direct:
        """Return what runs on the batch as a whole, of so many rows; see `Direct`."""
        samples = rows // self._rows_per_sample
        copies = Copies(self._recording(), samples, self._anchor, self._samples)
        return Direct(rows, copies, self._use, error, self.tell)


def _reason(error: Exception) -> str:
    """Return what an error says, in a line."""
    found = " ".join(str(error).split())
    return found if isinstance(error, PsgradError) else f"{type(error).__name__}: {found}"


def _of_packed(layer: Layer, args: Any) -> Callable[..., Any] | None:
    """Return what runs a recurrent network on the batch as a whole, if what it is given is packed."""
    module, packed = layer.module, args and isinstance(args[0], PackedSequence)
    if packed and isinstance(module, nn.RNNBase) and type(module) in APART:
        return partial(run_packed, module)
    return None


def _tensors(args: Any, kwargs: Any) -> list[tuple[int, Tensor]]:
    """Return the tensors of a call, and their positions among its leaves."""
    return [(i, leaf) for i, leaf in enumerate(leaves_in(args, kwargs)) if isinstance(leaf, Tensor)]
