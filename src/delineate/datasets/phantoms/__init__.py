"""Simulated scans whose truth is known: anatomies, the scanners that see them, and data sets of both."""
