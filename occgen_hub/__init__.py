"""OccGen Hub: recordings in, 4D occupancy datasets out."""
