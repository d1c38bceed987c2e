"""The same as `flowlik.evaluation.uses.outliers`."""

from flowlik.evaluation.uses.outliers import auroc as auroc
from flowlik.evaluation.uses.outliers import outlier_detection as outlier_detection
from flowlik.evaluation.uses.outliers import reduced as reduced
