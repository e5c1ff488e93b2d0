"""`MemberLoader`: batches `[K, N, ...]`, every member its own order or bootstrap sample."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, cast

import torch
from torch import Tensor
from torch.utils._pytree import tree_map
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    RandomSampler,
    Sampler,
    Subset,
    TensorDataset,
    default_collate,
)

from psgrad.ensemble.members import kept_members
from psgrad.errors import ConfigError, MemberError

__all__ = ["MemberLoader"]


class MemberLoader:
    """Batches of K members at once, `[K, N, ...]` each tensor: what member k sees is what it would see alone.

    Member k has a `torch.Generator` seeded with `seeds[k]`. With `bootstrap` it first draws the member's
    sample, as many items as there are with replacement, which stays the same; then, every epoch,
    `torch.utils.data.RandomSampler` draws the order from it. `member(k)` is that loader alone.
    Nothing is drawn from the global random stream, except by a data set that does so itself.

    Parameters
    ----------
    dataset
        Map-style, the same for all; items as `torch.utils.data.default_collate` takes them. Strings come as
        K lists of N.
    batch_size
        N, of each member.
    seeds
        One a member.
    bootstrap
        Whether each member has a bootstrap sample of its own, or all items.
    drop_last
        Whether to leave out the last, smaller batch of an epoch.
    num_workers, pin_memory
        As for `torch.utils.data.DataLoader`.

    Raises
    ------
    ConfigError
        If the data set has no length or no items, or the batch size is not positive.
    MemberError
        If there is no seed, or two are equal: members would see the same.

    """

    def __init__(
        self,
        dataset: Dataset[Any],
        batch_size: int,
        seeds: Sequence[int],
        *,
        bootstrap: bool = False,
        drop_last: bool = False,
        num_workers: int = 0,
        pin_memory: bool = False,
    ) -> None:
        if not hasattr(dataset, "__len__") or len(dataset) == 0:
            raise ConfigError(f"a data set with a length and items is needed, got {type(dataset).__name__}")
        if isinstance(batch_size, bool) or not isinstance(batch_size, int) or batch_size < 1:
            raise ConfigError(f"batch_size must be a positive integer, got {batch_size!r}")
        self.seeds = [int(seed) for seed in seeds]
        if not self.seeds or len(set(self.seeds)) != len(self.seeds):
            raise MemberError(f"seeds must be one a member and differ, got {self.seeds}")
        self.dataset, self.batch_size = dataset, batch_size
        self.bootstrap, self.drop_last = bootstrap, drop_last
        self._streams = [_Stream(len(dataset), seed, bootstrap) for seed in self.seeds]
        self._batches = _Batches(self._streams, batch_size, drop_last)
        self._loader: DataLoader[Any] = DataLoader(
            _Rows(dataset),
            batch_size=None,  # an index is a whole batch
            sampler=self._batches,
            num_workers=num_workers,
            pin_memory=pin_memory,
            generator=torch.Generator().manual_seed(self.seeds[0]),  # of the workers' seeds
        )

    @property
    def members(self) -> int:
        """K, the number of members."""
        return len(self._streams)

    def __len__(self) -> int:
        """Batches of an epoch."""
        return len(self._batches)

    def __iter__(self) -> Iterator[Any]:
        """One epoch; the next one goes on with the members' generators."""
        return iter(self._loader)

    def member(self, k: int) -> DataLoader[Any]:
        """Return the loader of member k alone, from its first epoch: `[N, ...]`, the same items.

        Raises
        ------
        IndexError
            If there is no such member.

        """
        if not -self.members <= k < self.members:
            raise IndexError(f"member {k} of {self.members}")
        alone = _Stream(len(cast(Any, self.dataset)), self.seeds[k], self.bootstrap)
        dataset = self.dataset if alone.sample is None else Subset(self.dataset, alone.sample.tolist())
        return DataLoader(
            dataset,
            self.batch_size,
            sampler=RandomSampler(cast(Any, dataset), generator=alone.generator),
            drop_last=self.drop_last,
            generator=torch.Generator(),  # or it would draw from the global stream
        )

    def keep(self, indices: Sequence[int]) -> None:
        """Drop every member but these, in this order; the others go on where they are.

        It takes effect in an epoch that is under way, too, with the next batch (`num_workers=0`).

        Raises
        ------
        MemberError
            If there is none, one stands twice or does not exist.

        """
        kept = kept_members(indices, self.members)
        self.seeds = [self.seeds[k] for k in kept]
        self._streams[:] = [self._streams[k] for k in kept]

    def state_dict(self) -> dict[str, Any]:
        """Return the members' seeds and generators; between two epochs that is all there is."""
        states = torch.stack([stream.generator.get_state() for stream in self._streams])
        return {"seeds": list(self.seeds), "generators": states}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on with the epoch after the one that the state was taken behind.

        Raises
        ------
        MemberError
            If it is of members with other seeds.

        """
        if list(state["seeds"]) != self.seeds:
            raise MemberError(f"the state is of seeds {list(state['seeds'])}, the loader has {self.seeds}")
        for stream, generator in zip(self._streams, state["generators"], strict=True):
            stream.generator.set_state(generator.clone().cpu())


class _Stream:
    """One member's generator and bootstrap sample."""

    def __init__(self, items: int, seed: int, bootstrap: bool) -> None:
        self.items = items
        self.generator = torch.Generator().manual_seed(seed)
        self.sample = torch.randint(items, (items,), generator=self.generator) if bootstrap else None

    def shuffled(self) -> Tensor:
        """Draw the order of an epoch."""
        order = torch.tensor(list(RandomSampler(range(self.items), generator=self.generator)))
        return order if self.sample is None else self.sample[order]


class _Batches(Sampler[Tensor]):
    """Yields indices `[K, N]`."""

    def __init__(self, streams: list[_Stream], batch_size: int, drop_last: bool) -> None:
        self.streams = streams
        self.spans = BatchSampler(range(streams[0].items), batch_size, drop_last)

    def __len__(self) -> int:
        return len(self.spans)

    def __iter__(self) -> Iterator[Tensor]:
        orders = {stream: stream.shuffled() for stream in self.streams}
        for span in self.spans:
            yield torch.stack([orders[stream][span] for stream in self.streams])


class _Rows(Dataset[Any]):
    """A data set whose index is `[K, N]` indices of another."""

    def __init__(self, dataset: Dataset[Any]) -> None:
        self.dataset = dataset

    def __getitem__(self, indices: Tensor) -> Any:
        if type(self.dataset) is TensorDataset:
            return [tensor[indices] for tensor in self.dataset.tensors]
        members = [default_collate([self.dataset[i] for i in row]) for row in indices.tolist()]
        return tree_map(
            lambda *parts: torch.stack(parts) if isinstance(parts[0], Tensor) else list(parts),
            *members,
            is_leaf=_is_strings,
        )


def _is_strings(tree: Any) -> bool:
    return isinstance(tree, list) and bool(tree) and isinstance(tree[0], str)
