"""The same as `flowlik.evaluation.uses.gradient`."""

from flowlik.evaluation.uses.gradient import compared as compared
from flowlik.evaluation.uses.gradient import estimate_score as estimate_score
from flowlik.evaluation.uses.gradient import gradients as gradients
from flowlik.evaluation.uses.gradient import score as score
from flowlik.evaluation.uses.gradient import weight_gradient as weight_gradient
