"""Predictions to decisions: run-length masks, regions, resizing, the triplet rule."""
