"""Sources: one module each, found through the entry-point group `occgen_hub.builders`."""
