"""What likelihoods are used for: the same as `flowlik.evaluation.uses`."""

from flowlik.evaluation.uses import USES as USES
