"""Training: `flowlik train` and the cards of trained models."""
