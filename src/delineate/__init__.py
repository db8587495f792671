"""Delineate: train, compare and deploy networks that delineate organs and lesions in MR and CT."""

__version__ = "0.1.0"
