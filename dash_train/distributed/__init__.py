"""A run's ranks: who they are, how they meet and agree, and what happens when one is lost or told to stop."""
