"""Quality of a trained model: a task is one file, `launch/evaluate.py` runs them."""
