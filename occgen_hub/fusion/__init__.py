"""Fusion: from views to the static surface that frames agree on, and moving points per frame."""
