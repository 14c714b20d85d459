"""Sources, found through the entry-point group `occgen_hub.builders`."""
