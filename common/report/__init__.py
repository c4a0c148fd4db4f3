"""The self-contained report page and its plots."""
