"""Coordinate frames of ROS: the tree of /tf and /tf_static, and odometry."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from occgen_hub.errors import SourceError
from occgen_hub.geometry.trajectory import poses_at

from .recording import LONGEST_GAP, TOLERANCE, valid_poses
from .trajectories import poses_of

WORLD = "world of the odometry"
MOST_FRAMES = 1000


@dataclass
class _Edge:
    """parent_from_child, over time. rows: time in seconds, position (3), quaternion x y z w."""

    parent: str
    static: bool
    rows: list[list[float]] = field(default_factory=list)
    times: NDArray[np.float64] = field(default_factory=lambda: np.zeros(0))
    poses: NDArray[np.float64] = field(default_factory=lambda: np.zeros((0, 4, 4)))


class Transforms:
    """A tree of frames by name, each with its parent."""

    def __init__(self) -> None:
        self._edges: dict[str, _Edge] = {}

    def add(self, transform: Any, when: int, *, static: bool) -> None:
        """Add a TransformStamped that was recorded at `when` nanoseconds."""
        parent, child = _name(transform.header.frame_id), _name(transform.child_frame_id)
        moved, turned = transform.transform.translation, transform.transform.rotation
        self._add(parent, child, transform.header.stamp, when, moved, turned, static=static)

    def _add(
        self,
        parent: str,
        child: str,
        stamp: Any,
        when: int,
        moved: Any,
        turned: Any,
        *,
        static: bool,
    ) -> None:
        if (edge := self._edges.get(child)) is None or edge.parent != parent:
            if len(self._edges) > MOST_FRAMES:
                return
            edge = self._edges[child] = _Edge(parent, static)
        time = stamp.sec + stamp.nanosec * 1e-9 or when * 1e-9
        edge.rows.append([time, moved.x, moved.y, moved.z, turned.x, turned.y, turned.z, turned.w])

    def finish(self, offset: float) -> None:
        """Make the poses of the added transforms. offset: seconds to add to moving ones."""
        for edge in self._edges.values():
            rows = np.array(edge.rows)
            poses = poses_of(rows[:, 1:4], rows[:, 4:])
            usable = valid_poses(poses)
            times, first = np.unique(rows[usable, 0], return_index=True)
            edge.times, edge.poses = times + offset, poses[usable][first]

    def moves(self, frame: str) -> bool:
        """Whether any transform above a frame moves."""
        return any(not edge.static for edge in self._above(frame))

    def _above(self, frame: str) -> list[_Edge]:
        """The edges from a frame up to the root."""
        edges, name = list[_Edge](), _name(frame)
        while (edge := self._edges.get(name)) is not None and len(edges) <= MOST_FRAMES:
            edges.append(edge)
            name = edge.parent
        return edges

    def at(
        self, times: NDArray[np.float64], frame: str
    ) -> tuple[NDArray[np.float64], NDArray[np.bool_], NDArray[np.float64]]:
        """(n, 4, 4) root_from_frame, (n,) bool: which are known, and the known times.

        Each transform is interpolated separately.
        """
        result, good = np.tile(np.eye(4), (len(times), 1, 1)), np.ones(len(times), np.bool_)
        moments = times
        for edge in self._above(frame):
            if not len(edge.poses):
                good[:] = False
            elif edge.static:
                result = edge.poses[-1] @ result
            else:
                poses, there = poses_at(times, edge.times, edge.poses, LONGEST_GAP, TOLERANCE)
                result, moments = poses @ result, edge.times
                good &= there
        return result, good, moments

    def static_to(self, frame: str, ancestor: str) -> list[_Edge] | None:
        """The edges from a frame up to an ancestor; None without a path, or if one moves."""
        edges, name = list[_Edge](), _name(frame)
        while name != _name(ancestor):
            edge = self._edges.get(name)
            if edge is None or not edge.static or len(edges) > MOST_FRAMES:
                return None
            edges.append(edge)
            name = edge.parent
        return edges


def odometry(
    place: Path,
    messages: Iterable[tuple[int, Any]],
    tree: Transforms,
    frame: str,
    offset: float,
    *,
    mapped: bool,
) -> Transforms:
    """A tree in which odometry or poses move the camera's frame.

    Odometry moves its child frame, and `tree` must have a fixed transform from there to the camera.
    Poses without a child frame are the camera's. mapped: whether the user gives the transform.
    """
    result, child = Transforms(), ""
    for when, message in messages:
        child = getattr(message, "child_frame_id", "")
        pose = message.pose if hasattr(message.pose, "position") else message.pose.pose
        moved, turned = pose.position, pose.orientation
        result._add(WORLD, "body", message.header.stamp, when, moved, turned, static=False)
    result.finish(offset)
    fixed: list[_Edge] = []
    if child and not mapped and _name(child) != _name(frame):
        found = tree.static_to(frame, child)
        if found is None:
            problem = f"has no fixed transform from {child!r} to the camera's frame {frame!r}"
            raise SourceError(place, problem, "record /tf_static, or give --topics pose=TOPIC")
        fixed = found
    pose = np.eye(4)
    for edge in fixed:
        pose = edge.poses[-1] @ pose
    body_from_camera = _Edge("body", static=True, times=np.zeros(1), poses=pose[None])
    result._edges[_name(frame)] = body_from_camera
    return result


def _name(frame: str) -> str:
    """ROS 1 wrote a slash before the names of frames."""
    return str(frame).lstrip("/")
