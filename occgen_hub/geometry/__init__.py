"""Poses, cameras and clouds; arrays in, arrays out."""
