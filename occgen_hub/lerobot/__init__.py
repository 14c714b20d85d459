"""A trajectory as a LeRobot v2.1 dataset, written from a schema."""
