"""Studies: variants of one recipe trained side by side, and what they found."""
