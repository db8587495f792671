"""Experiments of many runs: a base recipe, what varies, how it is judged, and what comes of it."""
