"""Feature networks that distances between samples are measured in."""

from flowlik_models.features.classifier import DigitsFeatures, ImageFeatures, extractor_for, load_extractor

__all__ = ["DigitsFeatures", "ImageFeatures", "extractor_for", "load_extractor"]
