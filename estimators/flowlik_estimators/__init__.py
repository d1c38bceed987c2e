"""How log p(x) of a flow model is computed: one module per family, found by name.

>>> from flowlik_estimators import get
>>> get("ode", rtol=1e-6, trace="hutchinson").label
'ode[rtol=1e-06,trace=hutchinson]'
"""

from flowlik_estimators.base import Bound, Estimator
from flowlik_estimators.call import Estimate, Run, Samples, standard_normal_log_prob
from flowlik_estimators.counting import Cost, counted
from flowlik_estimators.divergence.whole_error import with_error
from flowlik_estimators.examination import Finding, examine
from flowlik_estimators.grids import time_grid
from flowlik_estimators.registry import available, get, load_families, parse_spec, register

load_families()

__all__ = [
    "Bound",
    "Cost",
    "Estimate",
    "Estimator",
    "Finding",
    "Run",
    "Samples",
    "available",
    "counted",
    "elbo",
    "energy",
    "exact_flow",
    "examine",
    "f2d2",
    "f2d2_corrected",
    "flow_map_exact",
    "generator",
    "get",
    "meanflow",
    "ode",
    "parse_spec",
    "peers",
    "pi_flow",
    "register",
    "self_guidance",
    "standard_normal_log_prob",
    "time_grid",
    "whitened",
    "with_error",
]
