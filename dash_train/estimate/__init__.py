"""Memory and time of a recipe's training step, before anything is started."""
