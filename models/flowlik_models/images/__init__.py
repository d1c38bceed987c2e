"""Real images in their official formats: found, verified, read lazily, dequantised with keyed noise."""

from .catalog import CATALOG, DataSet
from .errors import DataError, MissingDataError
from .image_set import ImageSet, evaluation_order, open_images
from .places import cache_dir, data_root

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
