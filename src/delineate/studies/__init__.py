"""Experiments of many runs: a recipe, what varies, how it is measured, and the report."""
