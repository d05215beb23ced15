"""Original key layouts of single-file checkpoints."""
