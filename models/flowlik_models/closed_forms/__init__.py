"""Closed forms: models whose density, velocity and divergence are known exactly."""
