"""Figures of likelihoods and their errors."""
