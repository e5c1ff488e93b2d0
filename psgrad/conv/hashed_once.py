"""Frozen dataclasses that are looked up at every call, by a hash that is computed once."""

from __future__ import annotations

from dataclasses import fields
from functools import cached_property
from typing import Any, ClassVar

__all__ = ["HashedOnce"]


class HashedOnce:
    """Base of a frozen dataclass that says `__hash__ = HashedOnce.__hash__`, or it gets one of its own."""

    __dataclass_fields__: ClassVar[dict[str, Any]]

    @cached_property
    def _hash(self) -> int:
        return hash(tuple(self.__getstate__().values()))

    def __hash__(self) -> int:
        """Of the fields, as a dataclass has it."""
        return self._hash

    def __getstate__(self) -> dict[str, Any]:
        """Return the fields alone: a hash is another one in another process."""
        return {field.name: getattr(self, field.name) for field in fields(self)}
