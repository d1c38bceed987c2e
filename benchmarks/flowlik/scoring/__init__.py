"""Models and data of one's own: scored, and distilled into joint flow maps."""
