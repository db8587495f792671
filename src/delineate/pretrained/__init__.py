"""Networks with published weights: their layers, and the store of weight files."""
