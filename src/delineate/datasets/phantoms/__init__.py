"""Simulated scans with known truth: anatomies, the scanners that image them, and data sets of both."""
