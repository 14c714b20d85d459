"""Pictures of what was built."""
