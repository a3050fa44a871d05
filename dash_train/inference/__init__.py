"""Trained models at work: loading them, generating text, choosing how to decode and reporting what was read."""
