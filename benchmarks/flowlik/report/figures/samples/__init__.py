"""Figures of samples and their distances to real data."""
