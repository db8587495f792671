"""Bundles for programs without Delineate."""
