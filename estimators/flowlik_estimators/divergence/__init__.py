"""The divergence of a field: products, probes, what they are worth, and the integral along a path."""
