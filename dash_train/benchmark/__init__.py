"""Programs that time this project against its peers; `launch/benchmark.py` runs them."""
