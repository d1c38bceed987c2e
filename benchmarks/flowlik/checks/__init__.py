"""Checks: what must hold of estimators, accuracies and recorded runs."""
