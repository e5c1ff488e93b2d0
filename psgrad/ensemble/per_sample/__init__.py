"""Per-sample gradients of an ensemble: every member's, as if it were alone.

`capture` stands where `psgrad.capture.Capture` stands for one model; `folded` captures the layers of a folded
run, `looped` the members one after the other.
"""

from psgrad.ensemble.per_sample.capture import MemberCapture

__all__ = ["MemberCapture"]
