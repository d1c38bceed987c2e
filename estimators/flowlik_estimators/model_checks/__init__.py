"""What holds while an estimator asks a model: the model stays as it is, and what it answers is looked at."""
