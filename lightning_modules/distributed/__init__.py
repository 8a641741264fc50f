"""Several processes: losses over all of them, interruption, sharded parameters and checkpoints."""
