"""Your own images: classification, detection or segmentation, depending on the labels."""
