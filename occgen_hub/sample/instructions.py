"""Instructions for a walk in words, from the rooms and the furniture along it."""

from __future__ import annotations

import json
from dataclasses import dataclass

import numpy as np

from occgen_hub.sample.mesh import Floats
from occgen_hub.sample.paths import Walk
from occgen_hub.sample.scene import Scene

SEES = 3.5  # metres: how far a landmark may be
TURNS = np.radians(20)
WAYS = {
    0: ("Walk straight ahead", "keep straight on"),
    1: ("Bear left", "curve round to the left"),
    -1: ("Bear right", "curve round to the right"),
}


@dataclass(frozen=True)
class Task:
    """An instruction for frames `first` to `last`, inclusive. whole: whether for the whole walk."""

    text: str
    revised: str
    first: int
    last: int
    whole: bool

    def json(self) -> str:
        """The task in InternData-N1's format: a JSON string that contains JSON."""
        span = [self.first, self.last]
        if self.whole:
            record: dict[str, object] = {"sum_instruction": self.text, "sum_indexes": span}
        else:
            record = {
                "sub_instruction": self.text,
                "sub_indexes": span,
                "revised_sub_instruction": self.revised,
            }
        return json.dumps(record, ensure_ascii=False)


def tasks_of(scene: Scene, walk: Walk) -> tuple[Task, ...]:
    """The task of the whole walk, and one for each room on its way."""
    stretches = _stretches(scene, walk)
    parts = []
    for i, (first, last, room) in enumerate(stretches):
        onward = stretches[i + 1][2] if i + 1 < len(stretches) else None
        text, revised = _sentences(scene, walk, first, last, room, onward)
        parts.append(Task(text, revised, first, last, False))
    start = f"You are in the {scene.plan.rooms[stretches[0][2]].name}. "
    whole = start + " Then ".join(_lower_first(p.text, i) for i, p in enumerate(parts))
    return (Task(whole, whole, 0, len(walk.position) - 1, True), *parts)


def _stretches(scene: Scene, walk: Walk) -> list[tuple[int, int, int]]:
    """First frame, last frame and room of each stretch. A doorway belongs to the room before it."""
    rooms = [scene.plan.room_at(x, y) for x, y in walk.position]
    known = [r for r in rooms if r >= 0]
    before = known[0] if known else 0
    out: list[tuple[int, int, int]] = []
    for frame, room in enumerate(rooms):
        before = room if room >= 0 else before
        if out and out[-1][2] == before:
            out[-1] = (out[-1][0], frame, before)
        else:
            out.append((frame, frame, before))
    return out


def _sentences(
    scene: Scene, walk: Walk, first: int, last: int, room: int, onward: int | None
) -> tuple[str, str]:
    """One part of the walk in words, briefly and in detail."""
    turned = walk.course[last] - walk.course[first]
    way, livelier = WAYS[0 if abs(turned) < TURNS else int(np.sign(turned))]
    passed = _landmark(scene, walk.position[first], walk.course[first], room)
    ahead = _landmark(scene, walk.position[last], walk.course[last], room)
    name = scene.plan.rooms[room].name
    past = f", with the {passed[0]} {passed[1]}" if passed else ""
    if onward is not None:
        end = f"go through the doorway into the {scene.plan.rooms[onward].name}"
    elif ahead and passed and ahead[0] == passed[0]:
        end = f"stop when it is {ahead[1]}"
    elif ahead:
        end = f"stop with the {ahead[0]} {ahead[1]}"
    else:
        end = "stop there"
    hint = f"With the {passed[0]} {passed[1]}, " if passed else "Without haste, "
    return (
        f"{way} in the {name}{past}, and {end}.",
        f"{hint}{livelier} across the {name}, then {end}.",
    )


def _landmark(scene: Scene, at: Floats, course: float, room: int) -> tuple[str, str] | None:
    """The nearest object of the room in front of the camera, and its side."""
    best: tuple[float, str, str] | None = None
    for p in scene.placed:
        if p.room != room or not p.furniture.blocks:
            continue
        offset = np.array(p.position[:2]) - at
        distance = float(np.hypot(*offset))
        angle = (np.arctan2(offset[1], offset[0]) - course + np.pi) % (2 * np.pi) - np.pi
        if distance > SEES or abs(angle) > np.radians(80) or (best and distance > best[0]):
            continue
        side = "on your left" if angle > 0 else "on your right"
        side = "ahead of you" if abs(angle) < np.radians(15) else side
        best = distance, p.furniture.name, side
    return (best[1], best[2]) if best else None


def _lower_first(text: str, i: int) -> str:
    return text if i == 0 else text[0].lower() + text[1:]
