"""Phantom chest radiographs and sample competitions, so that every solution runs without real data."""

from common.phantom.radiograph import Finding, Lungs, Radiograph, draw

__all__ = ["Finding", "Lungs", "Radiograph", "draw"]
