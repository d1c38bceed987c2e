"""The report: records as a reader sees them, in tables, figures and one HTML page."""
