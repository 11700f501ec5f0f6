"""Measurements that a person can repeat: `tokenreel bench NAME`."""
