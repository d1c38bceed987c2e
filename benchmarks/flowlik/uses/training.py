"""The same as `flowlik.evaluation.uses.training`."""

from flowlik.evaluation.uses.training import training_curve as training_curve
