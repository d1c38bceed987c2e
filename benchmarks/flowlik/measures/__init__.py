"""Measures: functions on arrays over items."""
