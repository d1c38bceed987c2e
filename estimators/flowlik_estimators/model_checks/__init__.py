"""Checks of a model, made before its numbers are believed."""
