"""The divergence of a field: vector-Jacobian products, probes and their variance, and the integral along a path."""
