"""Measures: functions on arrays over items, and the columns they fill; those of one's own too (`register`)."""

from flowlik.measures.judged_items import JudgedItems
from flowlik.measures.registry import Measure, register
from flowlik.records.columns import MEASURES, Column

__all__ = ["MEASURES", "Column", "JudgedItems", "Measure", "register"]
