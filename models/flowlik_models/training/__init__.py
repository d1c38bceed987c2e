"""Training: batches, losses and the loop that turns a recipe into a checkpoint."""

from flowlik_models.training.trainer import Progress, TrainingError, train

__all__ = ["Progress", "TrainingError", "train"]
