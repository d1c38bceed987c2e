"""Figures of a run, drawn from its records and items alone."""
