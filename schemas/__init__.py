"""The contracts, as data; read by `occgen_hub.schema`."""
