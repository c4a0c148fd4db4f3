"""Your own images: classification, detection or segmentation, whichever the labels are made for."""
