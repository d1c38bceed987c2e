"""Gaussian mixtures: the public path of `flowlik_models.closed_forms.mixture`."""

from flowlik_models.closed_forms.mixture import GaussianMixture

__all__ = ["GaussianMixture"]
