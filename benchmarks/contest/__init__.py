"""What `benchmarks/peers.py` runs side by side: models, ways to make them fast, and a process for each."""
