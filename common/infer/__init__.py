"""Trained networks to predictions: batches, test-time augmentation, ensembles."""
