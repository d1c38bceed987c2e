"""Other people's networks as fields on the suite's clock; `wrap` is public as `flowlik.wrap`."""

from flowlik_models.adapters.exact_flow import WrappedFlow
from flowlik_models.adapters.field import WrappedField
from flowlik_models.adapters.paths import Path, cosine, ddpm, edm, reverse, straight, ve, vp
from flowlik_models.adapters.source import GaussianSource, SourceWarning
from flowlik_models.adapters.wrap import wrap

__all__ = [
    "GaussianSource",
    "Path",
    "SourceWarning",
    "WrappedField",
    "WrappedFlow",
    "cosine",
    "ddpm",
    "edm",
    "reverse",
    "straight",
    "ve",
    "vp",
    "wrap",
]
