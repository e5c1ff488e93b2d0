"""What all tests of private training allow themselves."""

import warnings
from collections.abc import Iterator

import pytest


@pytest.fixture(autouse=True)
def batches_of_their_own() -> Iterator[None]:
    """Steps on hand-made batches are not warned of: the tests ask for norms and noise, and no epsilon."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "this step's batch did not come from the loader", UserWarning)
        yield
