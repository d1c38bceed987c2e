"""Models and data of one's own: their likelihood in one call."""
