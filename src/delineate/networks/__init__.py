"""Networks, one file a family; every specification states its divisor and margin and builds its network."""
