"""Every exception psgrad raises on purpose. All derive from `PsgradError`."""

__all__ = [
    "CaptureError",
    "ConfigError",
    "MemberError",
    "PsgradError",
    "RefusedModelError",
    "ShapeError",
    "StrategyError",
]


class PsgradError(Exception):
    """Base of every error that psgrad raises on purpose."""


class ShapeError(PsgradError, ValueError):
    """Shapes, ranks or batch axes that do not fit together; the message holds them."""


class StrategyError(PsgradError, ValueError):
    """A strategy that does not exist, or that refused the problem it was asked for by name."""


class RefusedModelError(PsgradError, ValueError):
    """A model whose per-sample gradients do not exist or cannot be had; names the modules."""


class CaptureError(PsgradError, RuntimeError):
    """A backward pass whose per-sample gradients would have been incomplete; names the parameters."""


class ConfigError(PsgradError, ValueError):
    """A setting that is unknown or out of range; names the key."""


class MemberError(PsgradError, ValueError):
    """Modules that cannot be the members of one ensemble; names the members and what differs."""
