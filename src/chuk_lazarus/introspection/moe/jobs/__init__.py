"""How work is run: a model opened, a layer measured, memory and threads, resuming, a cluster."""
