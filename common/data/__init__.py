"""Originals to arrays and tables: DICOM decoding, the store, folds, loaders, augmentation."""
