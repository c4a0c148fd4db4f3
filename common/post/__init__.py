"""From predictions to submissions: run-length masks, regions of masks, fusion of boxes."""
