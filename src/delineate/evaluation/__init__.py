"""Predictions against references: paired, measured, summarised, compared."""
