"""The camera grid, voxelisation, visibility, and how they are stored."""
