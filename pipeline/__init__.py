"""Data: corpus to shards to batches. Knows no model; only `stages` imports Ray, and only `loader` torch."""
