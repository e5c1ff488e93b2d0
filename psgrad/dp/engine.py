"""`PrivacyEngine`: the door of Opacus's engine, with psgrad's clipping behind it."""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from typing import IO, Any, BinaryIO

import torch
from opacus.accountants.accountant import IAccountant
from opacus.data_loader import DPDataLoader
from torch import Tensor, nn
from torch.utils.data import DataLoader

from psgrad.clipping import ClipPerSample, as_style, check_loss_reduction
from psgrad.dp.accounting import accountant_named, epsilon_spent, load_spent, noise_multiplier_for
from psgrad.dp.arguments import (
    MaxGradNorm,
    expected_batch_size,
    refuse_options,
    style_of,
    unwrapped,
)
from psgrad.dp.checkpoints import from_opacus
from psgrad.dp.compatible import without_batch_norm
from psgrad.dp.loader import PoissonLoader, sample_rate_of, share_of_batch
from psgrad.dp.optimizer import PrivateOptimizer
from psgrad.dp.wrapper_names import give_wrapper_names
from psgrad.errors import ConfigError, RefusedModelError
from psgrad.loss import LossReduction

__all__ = ["PrivacyEngine"]

Path = str | os.PathLike[str] | BinaryIO | IO[bytes]


class PrivacyEngine:
    """Make a module, an optimizer and a data loader private: Opacus's engine, argument by argument.

    A script written for Opacus changes the import. What is returned for the module is the user's own
    module: while it is attached, its `backward` clips; keys of its `state_dict` stay as they are.

    Parameters
    ----------
    accountant
        "prv" or "rdp", of Opacus. "gdp" is refused: it is an approximation that can report less than is
        spent.
    secure_mode
        Refused when True: Opacus's needs a generator of an unmaintained package. See `noise_generator` for
        what is promised of the noise.

    Raises
    ------
    ConfigError
        As said.

    Examples
    --------
    >>> engine = PrivacyEngine()                                                   # doctest: +SKIP
    >>> model, optimizer, loader = engine.make_private(                            # doctest: +SKIP
    ...     module=model, optimizer=optimizer, data_loader=loader,
    ...     noise_multiplier=1.0, max_grad_norm=1.0)
    >>> for x, y in loader:                                                        # doctest: +SKIP
    ...     optimizer.zero_grad()
    ...     criterion(model(x), y).backward()
    ...     optimizer.step()
    >>> engine.get_epsilon(delta=1e-5)                                             # doctest: +SKIP

    """

    def __init__(self, *, accountant: str = "prv", secure_mode: bool = False) -> None:
        if secure_mode:
            raise ConfigError(
                "secure_mode=True is not offered: noise is seeded from the operating system's source, "
                "see psgrad.dp.noise_generator"
            )
        self._accountant = accountant_named(accountant)
        self._mechanism = accountant
        self._in_use = self._not_poisson = False

    @property
    def accountant(self) -> IAccountant:
        """Who records the steps. Another one can be set before `make_private`.

        Raises
        ------
        ConfigError
            After that, when it is set: what the optimizers' steps spend would not be in it.

        """
        return self._accountant

    @accountant.setter
    def accountant(self, accountant: IAccountant) -> None:
        if self._in_use:
            raise ConfigError(
                "accountant is set after make_private: the optimizer goes on telling the one it was made "
                "with, and get_epsilon would not count its steps. Set it before, or use a new PrivacyEngine"
            )
        self._accountant = accountant

    def make_private(
        self,
        *,
        module: nn.Module,
        optimizer: torch.optim.Optimizer,
        criterion: Callable[..., Tensor] | None = None,
        data_loader: DataLoader[Any],
        noise_multiplier: float,
        max_grad_norm: MaxGradNorm,
        batch_first: bool = True,
        loss_reduction: LossReduction = "mean",
        poisson_sampling: bool = True,
        clipping: str | None = None,
        noise_generator: torch.Generator | None = None,
        grad_sample_mode: str = "hooks",
        rand_on_empty: bool = False,
        wrap_model: bool = True,
        rows_per_sample: int = 1,
        memory_budget: int | None = None,
        **unknown: Any,
    ) -> tuple[Any, ...]:
        """Attach the engine.

        Parameters
        ----------
        module
            Any module, in training mode; Opacus's wrapper is taken off.
        optimizer
            Any of `torch.optim`, over parameters of the module.
        criterion
            The loss; returned as it is under grad_sample_mode="ghost". A reduction it states is compared.
        data_loader
            Of a map-style data set; its expected batch size stays. With Poisson sampling every batch that the
            returned one yields is the batch of one step, which may take it in parts.
        noise_multiplier
            Standard deviation of the noise, in units of the clipped sum's sensitivity.
        max_grad_norm
            C; under clipping="per_layer" also a sequence with one norm for each trainable parameter, as
            Opacus has it; or a style with its settings, `psgrad.clipping.Automatic(1.0)`.
        batch_first
            True: axis 0 of every input is the batch.
        loss_reduction
            "mean" or "sum", of the loss over its batch. Under "mean" the noisy sum is divided by the
            expected batch size, under "sum" by nothing.
        poisson_sampling
            Whether to sample as the accountant assumes. Without it `get_epsilon` raises.
        clipping
            A name in `psgrad.clipping.STYLES`; None for "flat".
        noise_generator
            A seeded generator makes a run repeatable, and its noise known to whoever knows the seed.
        grad_sample_mode
            One of `psgrad.dp.arguments.MODES`.
        rand_on_empty
            Opacus's: an empty batch is filled with random numbers. Refused: it is not needed.
        wrap_model
            Opacus's: no module is ever wrapped here, and `optimizer.clip.remove()` cleans up.
        rows_per_sample
            K, the consecutive rows of a batch that make one sample.
        memory_budget
            Bytes that clipping may hold, see `psgrad.clip_per_sample`; None for no limit.
        unknown
            Options of Opacus that psgrad has not, and misspelt ones: refused by name.

        Returns
        -------
        tuple
            (module, optimizer, data loader); under "ghost" (module, optimizer, criterion, data loader).

        Raises
        ------
        ConfigError
            If an argument is refused, out of range, or does not fit the loss.
        RefusedModelError
            If the module mixes samples, has nothing to train, or is wrapped for distributed training.

        """
        refuse_options(batch_first, rand_on_empty, grad_sample_mode, unknown)
        module = unwrapped(module)
        if not module.training:
            raise ConfigError("the module is in evaluation mode: call module.train() first")
        if isinstance(getattr(criterion, "reduction", None), str):  # else `backward` reads the loss's graph
            check_loss_reduction(criterion, loss_reduction)  # type: ignore[arg-type]  # it has a reduction
        style = style_of(module, max_grad_norm, clipping)
        poisson = poisson_sampling or isinstance(data_loader, DPDataLoader)
        # Where it is no sampling rate, get_epsilon says so.
        sample_rate = (sample_rate_of if poisson else share_of_batch)(data_loader)
        clip = ClipPerSample(
            module, style, loss_reduction, rows_per_sample, into_sum=True, memory_budget=memory_budget
        )
        try:
            private = PrivateOptimizer(
                optimizer,
                clip,
                noise_multiplier=noise_multiplier,
                expected_batch_size=expected_batch_size(data_loader, sample_rate),
                accountant=self.accountant,
                sample_rate=sample_rate,
                generator=noise_generator,
                divisor=None if loss_reduction == "mean" else 1.0,  # as Opacus: a sum stays a sum
            )
            loader = PoissonLoader(data_loader, private) if poisson else data_loader
        except BaseException:  # the data set's own among them
            clip.remove()
            raise
        give_wrapper_names(module, private)
        self._in_use = True
        self._not_poisson |= not poisson
        if grad_sample_mode == "ghost":
            return module, private, criterion or nn.CrossEntropyLoss(reduction=loss_reduction), loader
        return module, private, loader

    def make_private_with_epsilon(
        self,
        *,
        module: nn.Module,
        optimizer: torch.optim.Optimizer,
        data_loader: DataLoader[Any],
        target_epsilon: float,
        target_delta: float,
        epochs: int,
        max_grad_norm: MaxGradNorm,
        **options: Any,
    ) -> tuple[Any, ...]:
        """Attach the engine with the least noise that keeps `epochs` epochs within (epsilon, delta).

        Parameters
        ----------
        module, optimizer, data_loader, max_grad_norm, options
            As for `make_private`, without its noise_multiplier.
        target_epsilon, target_delta
            The privacy to spend over all epochs, what the accountant has recorded already not counted.
        epochs
            Passes of len(data_loader) steps each.

        Returns
        -------
        tuple
            As `make_private`.

        Raises
        ------
        ConfigError
            As `make_private`; if the target cannot be met, or the accountant has recorded steps already.

        """
        if len(self.accountant):
            raise ConfigError(
                f"the accountant has recorded {len(self.accountant)} kinds of steps already, which this "
                "target would not count: use a new PrivacyEngine, or make_private with a noise_multiplier"
            )
        if epochs < 1:
            raise ConfigError(f"epochs must be at least 1, got {epochs}")
        sigma = noise_multiplier_for(
            target_epsilon,
            target_delta,
            sample_rate=sample_rate_of(data_loader),
            steps=math.ceil(epochs * len(data_loader)),
            accountant=self._mechanism,
        )
        return self.make_private(
            module=module,
            optimizer=optimizer,
            data_loader=data_loader,
            noise_multiplier=sigma,
            max_grad_norm=max_grad_norm,
            **options,
        )

    def get_epsilon(self, delta: float) -> float:
        """Return the epsilon of all steps so far at this delta: 0 before the first, inf if one had no noise.

        Raises
        ------
        ConfigError
            If delta is out of range, or a loader does not sample as the accountant assumes.

        """
        if not 0 < delta < 1:
            raise ConfigError(f"delta must be between 0 and 1, got {delta}")
        if self._not_poisson:
            raise ConfigError(
                "poisson_sampling=False: no accountant here describes these batches, and an epsilon for "
                "Poisson-sampled ones would be too small"
            )
        return epsilon_spent(self.accountant, delta)

    def save_checkpoint(
        self,
        *,
        path: Path,
        module: nn.Module,
        optimizer: PrivateOptimizer | None = None,
        noise_scheduler: Any = None,
        grad_clip_scheduler: Any = None,
        checkpoint_dict: dict[str, Any] | None = None,
        module_state_dict_kwargs: dict[str, Any] | None = None,
        torch_save_kwargs: dict[str, Any] | None = None,
    ) -> None:
        """Write the states of the module, the accountant and what else is given, under Opacus's keys.

        Opacus loads it too, if `module_state_dict_kwargs={"prefix": "_module."}` names the parameters as
        its `GradSampleModule` does.
        """
        checkpoint = dict(checkpoint_dict or {})
        checkpoint["module_state_dict"] = module.state_dict(**(module_state_dict_kwargs or {}))
        checkpoint["privacy_accountant_state_dict"] = self.accountant.state_dict()
        for key, part in (
            ("optimizer", optimizer),
            ("noise_scheduler", noise_scheduler),
            ("grad_clip_scheduler", grad_clip_scheduler),
        ):
            if part is not None:
                checkpoint[f"{key}_state_dict"] = part.state_dict()
        torch.save(checkpoint, path, **(torch_save_kwargs or {}))

    def load_checkpoint(
        self,
        *,
        path: Path,
        module: nn.Module,
        optimizer: PrivateOptimizer | None = None,
        noise_scheduler: Any = None,
        grad_clip_scheduler: Any = None,
        module_load_dict_kwargs: dict[str, Any] | None = None,
        torch_load_kwargs: dict[str, Any] | None = None,
    ) -> dict[str, Any]:
        """Go on where `save_checkpoint` was called, psgrad's or Opacus's; return what it wrote.

        Steps that the accountant has recorded since, in the same process, stay recorded: they are spent.

        Raises
        ------
        ConfigError
            If something is asked for that was not saved, or was saved and is not asked for.

        """
        checkpoint: dict[str, Any] = torch.load(path, **{"weights_only": False, **(torch_load_kwargs or {})})
        asked = {
            "module": module,
            "privacy_accountant": self.accountant,
            "optimizer": optimizer,
            "noise_scheduler": noise_scheduler,
            "grad_clip_scheduler": grad_clip_scheduler,
        }
        for name, part in asked.items():
            saved = f"{name}_state_dict" in checkpoint
            if saved != (part is not None):
                raise ConfigError(
                    f"the checkpoint has {'a' if saved else 'no'} state of the {name}, which was "
                    f"{'not ' if saved else ''}asked for"
                )
        states = from_opacus(checkpoint, module, optimizer)
        module.load_state_dict(states["module_state_dict"], **(module_load_dict_kwargs or {}))
        load_spent(self.accountant, states["privacy_accountant_state_dict"])
        for name in ("optimizer", "noise_scheduler", "grad_clip_scheduler"):
            part = asked[name]
            if part is not None:
                part.load_state_dict(states[f"{name}_state_dict"])
        return checkpoint

    @staticmethod
    def validate(*, module: nn.Module, optimizer: Any = None, data_loader: Any = None) -> None:
        """Raise if the module is unfit; Opacus's other arguments are not looked at.

        Raises
        ------
        RefusedModelError
            Naming every offender by path, and what to use instead.

        """
        ClipPerSample(module, as_style(1.0), "sum", 1).remove()

    @classmethod
    def is_compatible(cls, *, module: nn.Module, optimizer: Any = None, data_loader: Any = None) -> bool:
        """Whether `validate` passes."""
        try:
            cls.validate(module=module, optimizer=optimizer, data_loader=data_loader)
        except RefusedModelError:
            return False
        return True

    @staticmethod
    def get_compatible_module(module: nn.Module) -> nn.Module:
        """Return a copy in which what mixes samples is replaced; see `psgrad.dp.compatible`.

        Raises
        ------
        ConfigError
            If the module is an ensemble, whose stacked parameters fit no layer that would be put in.

        """
        if hasattr(module, "per_sample_capture"):
            raise ConfigError(
                f"{type(module).__name__} stacks its members' parameters: replace the layers of every member "
                "before, Ensemble.from_factory(lambda: PrivacyEngine.get_compatible_module(make_model()))"
            )
        return without_batch_norm(module)
