"""Networks, one file per family; every specification states its divisor and margin and builds its network."""
