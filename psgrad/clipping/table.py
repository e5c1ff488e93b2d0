"""The clipping styles by name."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from psgrad.clipping.adaptive import AdaptiveQuantile
from psgrad.clipping.styles import Automatic, ClippingStyle, Flat, PerLayer
from psgrad.errors import ConfigError

__all__ = ["STYLES", "as_style"]

STYLES: dict[str, Callable[..., ClippingStyle]] = {
    "flat": Flat,
    "per_layer": PerLayer,
    "automatic": Automatic,
    "adaptive": AdaptiveQuantile,
}
"""Every style; the first argument of each is its max_norm. Norms without clipping: `psgrad.GradNorms`."""


def as_style(
    max_norm: float | Mapping[str, float] | ClippingStyle, style: str | None = None, **settings: Any
) -> ClippingStyle:
    """Return the style with this name and norm; a `ClippingStyle` is returned as it is.

    Parameters
    ----------
    max_norm
        What the style takes as its first argument, or the style itself.
    style
        A key of `STYLES`; None stands for "flat", or for the style itself.
    settings
        The style's other fields.

    Raises
    ------
    ConfigError
        If there is no such style, it was given twice, or its settings are wrong.

    """
    if isinstance(max_norm, ClippingStyle):
        if style is not None or settings:
            raise ConfigError(f"style={style!r} beside {max_norm}: a style has its settings already")
        return max_norm
    name = style or "flat"
    if name not in STYLES:
        raise ConfigError(f"unknown clipping style {name!r}; there are {', '.join(STYLES)}")
    if isinstance(max_norm, Mapping) and STYLES[name] is not PerLayer:
        raise ConfigError(f'max_norm by path is for style="per_layer", not for {name!r}')
    try:
        return STYLES[name](max_norm, **settings)
    except TypeError as err:
        raise ConfigError(
            f"clipping style {name!r}: {err}; see psgrad.clipping.{STYLES[name].__name__}"
        ) from err
