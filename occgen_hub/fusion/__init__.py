"""What several frames agree on: from views to the static surface, and what moves in each frame."""
