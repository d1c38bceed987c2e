"""References: how true and converged likelihoods are made."""
