"""Moments of data sets: estimated, checked, kept beside a checkpoint, attached to a model."""

from flowlik_models.moments.moments import FULL_LIMIT, attach, check, estimate, from_covariance, load, save

__all__ = ["FULL_LIMIT", "attach", "check", "estimate", "from_covariance", "load", "save"]
