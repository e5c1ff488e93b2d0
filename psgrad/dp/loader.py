"""Poisson-sampled batches: what the accountant assumes of the loader, and one batch to a step."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from opacus.data_loader import DPDataLoader
from opacus.utils.uniform_sampler import UniformWithReplacementSampler
from torch.utils.data import BatchSampler, DataLoader, IterableDataset, RandomSampler, SequentialSampler

from psgrad.dp.collation import WithEmptyBatches
from psgrad.dp.optimizer import PrivateOptimizer
from psgrad.errors import ConfigError

__all__ = ["PoissonLoader", "sample_rate_of", "share_of_batch"]


class PoissonLoader(DPDataLoader):
    """A loader's samples in Poisson batches, every one the batch of one step of `optimizer`.

    Opacus's loader, as its `BatchMemoryManager` expects it, that tells the optimizer of passes and batches:
    two batches in one step could hold a sample twice, which no bound allows for.

    Parameters
    ----------
    source
        Its data set, collation, workers and generator are taken over. A `DPDataLoader` keeps its rate.
    optimizer
        Is told.

    Raises
    ------
    ConfigError
        As `sample_rate_of`.

    """

    def __init__(self, source: DataLoader[Any], optimizer: PrivateOptimizer) -> None:
        self.sample_rate, self.distributed = sample_rate_of(source), False
        self._optimizer = optimizer
        optimizer.batches.expected = True
        DataLoader.__init__(  # not Opacus's, which makes a sampler that tells nobody
            self,
            dataset=source.dataset,
            batch_sampler=_Batches(source, self.sample_rate, optimizer),
            collate_fn=WithEmptyBatches(source.collate_fn, source.dataset[0]),
            num_workers=source.num_workers,
            pin_memory=source.pin_memory,
            timeout=source.timeout,
            worker_init_fn=source.worker_init_fn,
            multiprocessing_context=source.multiprocessing_context,
            generator=source.generator,
            prefetch_factor=source.prefetch_factor,
            persistent_workers=source.persistent_workers,
        )

    def __iter__(self) -> Iterator[Any]:
        """Return the batches of a pass."""
        for batch in super().__iter__():
            self._optimizer.batch_drawn()
            yield batch


class _Batches(UniformWithReplacementSampler):
    """Indices of a pass; also where a `BatchMemoryManager` gets them."""

    def __init__(self, source: DataLoader[Any], sample_rate: float, optimizer: PrivateOptimizer) -> None:
        super().__init__(
            num_samples=len(source.dataset),  # type: ignore[arg-type]  # sized
            sample_rate=sample_rate,
            generator=source.generator,
            steps=len(source),  # int(1 / (1 / n)) is not always n
        )
        self._optimizer = optimizer

    def __iter__(self) -> Iterator[list[int]]:
        self._optimizer.pass_begins()
        for batch in super().__iter__():
            self._optimizer.batch_sampled(len(batch))
            yield batch


def sample_rate_of(source: DataLoader[Any]) -> float:
    """Return q, the rate of Poisson batches that are as large as the loader's on average.

    Raises
    ------
    ConfigError
        If it is no `DataLoader`, samples by weights, from a part of its data set, by a sampler of its own,
        or has no batches: Poisson batches would be of other data than it says.

    """
    if isinstance(source, DPDataLoader):
        return float(source.sample_rate)
    if not isinstance(source, DataLoader):
        raise ConfigError(
            f"{type(source).__name__} is no torch.utils.data.DataLoader: no accountant here describes what "
            "it draws. Give a DataLoader; the members of an ensemble then share its batches"
        )
    if isinstance(source.dataset, IterableDataset):
        raise ConfigError("the data set is iterable, not map-style: no sample can be drawn with a known rate")
    if source.batch_size is None or type(source.batch_sampler) is not BatchSampler:
        raise ConfigError(
            f"the loader has {'no batch_size' if source.batch_sampler is None else 'its own batch_sampler'}: "
            "Poisson batches would replace what it draws. Give a DataLoader with a batch_size"
        )
    sampler = source.sampler
    # num_samples: a RandomSampler of fewer, or of more, than there are.
    fair = type(sampler) is SequentialSampler or (
        type(sampler) is RandomSampler
        and not sampler.replacement
        and sampler.num_samples == len(source.dataset)  # type: ignore[arg-type]  # sized
    )
    if not fair:
        raise ConfigError(
            f"the loader's {type(sampler).__name__} does not draw every sample once: Poisson batches would "
            "be of other data, and no accountant here describes its own. For a part of the data use "
            "torch.utils.data.Subset; against imbalance weigh the loss"
        )
    if not len(source):
        raise ConfigError(NO_BATCHES)
    return 1 / len(source)


def share_of_batch(source: DataLoader[Any]) -> float:
    """Return which part of the data a batch of the loader is, where it is to be left as it is.

    Raises
    ------
    ConfigError
        If that is not known, or there are no batches.

    """
    try:
        batches, _ = len(source), len(source.dataset)  # type: ignore[arg-type]  # sized
    except TypeError as error:
        raise ConfigError(
            f"the data set is iterable and of no known length ({error}), and the noisy sum is divided by the "
            "expected batch size: give its class a __len__, or use a map-style data set"
        ) from error
    if not batches:
        raise ConfigError(NO_BATCHES)
    return 1 / batches


NO_BATCHES = "the loader has no batches: the data set is empty, or drop_last leaves none"
