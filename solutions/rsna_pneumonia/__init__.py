"""RSNA pneumonia detection challenge."""
