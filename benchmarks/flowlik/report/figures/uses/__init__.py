"""Figures of what likelihoods are used for."""
