"""Training losses; each maps (network, batch, recipe) to one loss a sample and its parts."""

from .flow_matching import flow_matching_loss
from .meanflow import meanflow_loss, total_derivative
from .weights import adaptive

__all__ = ["adaptive", "flow_matching_loss", "meanflow_loss", "total_derivative"]
