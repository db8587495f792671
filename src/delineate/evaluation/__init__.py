"""Predictions against references: paired, measured, summed up, compared."""
