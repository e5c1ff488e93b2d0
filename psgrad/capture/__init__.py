"""Capture: how one backward pass hands every layer's contribution over.

`survey` says which modules own what is trained, and refuses; `capture` shadows their forward. Modules that
use parameters themselves, which no rule describes, are run by `owners`: on the batch as a whole (`direct`) if
the trials of the first batch (`learning`) say that samples stay apart, else one at a time (`region`).
`recorder` tells the consumer, in `contribution`s, and runs the backward of `repeatable` calls again for one
that asks.
"""

from psgrad.capture.attach import Attached, attach, attach_repeatable
from psgrad.capture.capture import Capture
from psgrad.capture.contribution import Contribution, KeptGrads, LayerUse, PerParameter
from psgrad.capture.recorder import Consumer

__all__ = [
    "Attached",
    "Capture",
    "Consumer",
    "Contribution",
    "KeptGrads",
    "LayerUse",
    "PerParameter",
    "attach",
    "attach_repeatable",
]
