"""A training run: the trainer, its engine and data, its checkpoints."""
