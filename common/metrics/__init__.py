"""Metrics, by default as the competitions compute them."""
