"""Building many episodes: shards, worker processes, clusters, and the files of the dataset."""
