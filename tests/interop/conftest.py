"""What every test inside of Opacus has to leave as it was."""

from collections.abc import Iterator

import pytest

from tests.interop.opacus_cases import state


@pytest.fixture
def tables_as_they_were() -> Iterator[None]:
    """No test leaves anything in Opacus."""
    before = state()
    yield
    assert state() == before
