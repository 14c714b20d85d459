"""Running episodes: which to build, where, what is done already."""
