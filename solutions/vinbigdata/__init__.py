"""VinBigData chest X-ray abnormalities detection."""
