"""Formulas that all three packages use, each stated once: time, steps, densities, transforms, streams of draws."""
