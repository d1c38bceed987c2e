"""The same as `flowlik.evaluation.uses.comparison`."""

from flowlik.evaluation.uses.comparison import Variant as Variant
from flowlik.evaluation.uses.comparison import exact_log_prob as exact_log_prob
from flowlik.evaluation.uses.comparison import families as families
from flowlik.evaluation.uses.comparison import model_comparison as model_comparison
from flowlik.evaluation.uses.comparison import ranked as ranked
