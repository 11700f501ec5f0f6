"""Data: corpus to shards to batches. Knows no model; only `stages` imports Ray, only `loader` and `frames` torch."""
