"""Poses, cameras, point clouds, Sim3 transforms and surfaces, as functions of arrays."""
