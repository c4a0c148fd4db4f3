"""ChestX-ray14: which of 14 findings a radiograph shows, on the official split."""
