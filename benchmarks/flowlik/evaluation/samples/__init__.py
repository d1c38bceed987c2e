"""Samples of an estimator and how near they are to real data."""
