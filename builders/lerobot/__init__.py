"""LeRobot datasets, v2.0 to v3.0, with any number of cameras."""

from .builder import LeRobotBuilder

__all__ = ["LeRobotBuilder"]
