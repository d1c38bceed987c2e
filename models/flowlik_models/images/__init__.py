"""Real images in their official formats: found, verified, read lazily, dequantised with keyed noise."""

from flowlik_models.images.catalog import CATALOG, DataSet
from flowlik_models.images.errors import DataError, MissingDataError
from flowlik_models.images.folders import cache_dir, data_root
from flowlik_models.images.image_set import ImageSet, evaluation_order, open_images

__all__ = [
    "CATALOG",
    "DataError",
    "DataSet",
    "ImageSet",
    "MissingDataError",
    "cache_dir",
    "data_root",
    "evaluation_order",
    "open_images",
]
