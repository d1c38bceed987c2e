"""Evaluation: one cell becomes one row and the arrays beside it."""
