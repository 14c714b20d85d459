"""Descriptions of the published checkpoints, and the place for their weights."""
