"""SIIM-ACR pneumothorax segmentation."""
