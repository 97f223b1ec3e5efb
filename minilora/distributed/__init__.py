"""Several processes that train one model together, started by torchrun."""
