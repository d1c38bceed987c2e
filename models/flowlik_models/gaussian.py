"""One Gaussian: the public path of `flowlik_models.closed_forms.gaussian`."""

from flowlik_models.closed_forms.gaussian import Gaussian, gaussian_map_coefficients, log1p_ratio
from flowlik_models.numerics.standard_normal import LOG_2PI, standard_normal_log_prob

__all__ = ["LOG_2PI", "Gaussian", "gaussian_map_coefficients", "log1p_ratio", "standard_normal_log_prob"]
