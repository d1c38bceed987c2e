"""What is estimated: closed-form flows, data sets, networks, objectives, training and checkpoints."""
