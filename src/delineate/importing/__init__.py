"""Models that other software trained, as bundles."""
