"""From predictions to submissions: run-length masks, connected regions, fusion of boxes."""
