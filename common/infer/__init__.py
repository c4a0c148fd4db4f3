"""Prediction by trained networks: batches, test-time augmentation, ensembles."""
