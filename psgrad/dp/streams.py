"""Streams of random numbers on the CPU that begin in a whole state, not in a seed.

PyTorch's generator on the CPU is a Mersenne twister, of whose seed only the lowest 32 bits count: whoever
knows the noise of one step up to rounding can try them all. The twister's state is 624 words of 32 bits. They
lie in what `torch.Generator.get_state` returns, and are written there.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

__all__ = ["WORDS", "is_known", "stream"]

WORDS = 624
"""32-bit words of a state."""
_PLACE = slice(24, 24 + 8 * WORDS)
"""Their bytes, a word in eight each, after the seed and two counts."""


@lru_cache(maxsize=1)
def is_known() -> bool:
    """Whether this PyTorch keeps the words where they are looked for: those of a seed are compared."""
    word, expected = 5489, [5489]
    for i in range(1, WORDS):  # Matsumoto & Nishimura 1998, mt19937ar
        word = (1812433253 * (word ^ (word >> 30)) + i) % 2**32
        expected.append(word)
    state = torch.Generator().manual_seed(expected[0]).get_state()
    return state.numel() > _PLACE.stop and state[_PLACE].view(torch.int64).tolist() == expected


def stream(words: Tensor) -> torch.Generator:
    """Return a generator on the CPU that begins in the state of these words, int64 `[624]` below 2**32.

    Only where `is_known`.
    """
    generator = torch.Generator().manual_seed(int(words[0]))
    state = generator.get_state()
    state[_PLACE].view(torch.int64).copy_(words)
    return generator.set_state(state)
