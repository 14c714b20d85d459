"""The rows of scripts/accuracy, their targets, and printing of the table.

Part of scripts/accuracy.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from accuracy_methods import OURS

from occgen_hub.config import Config


@dataclass(frozen=True)
class Row:
    """A kind of corruption. sample: arguments of `make_sample`; settings: of our method in this
    row; targets: the required minimum of each figure, or the maximum for ghosts.
    """

    sample: dict[str, Any] = field(default_factory=dict)
    settings: tuple[str, ...] = ()
    targets: dict[str, float] = field(default_factory=dict)


SENSOR = ("kinect", "flying", "speckle")
WHITE, DRIFT = (0.004, 0.15), (0.02, 0.3)
REFINED = ("refine_poses=true",) if "refine_poses" in Config.model_fields else ()

ROWS = {
    "none": Row(targets={"near": 0.999, "ghosts": 0.0001}),
    "kinect + flying + speckle": Row(
        {"noise": SENSOR}, targets={"near": 0.98, "ghosts": 0.002, "recall": 0.96}
    ),
    "stereo, correlated": Row(
        {"noise": ("stereo",)}, targets={"near": 0.97, "ghosts": 0.002, "recall": 0.955}
    ),
    "network-like": Row(
        {"noise": ("network",)}, targets={"near": 0.94, "ghosts": 0.002, "recall": 0.955}
    ),
    "pose noise 4 mm, 0.15 degrees": Row(
        {"pose_noise": WHITE}, targets={"near": 0.985, "ghosts": 0.001, "recall": 0.96}
    ),
    "pose drift 2 cm, 0.3 degrees": Row(
        {"pose_drift": DRIFT}, REFINED, {"near": 0.88, "ghosts": 0.002, "recall": 0.94}
    ),
    "people": Row(
        {"people": 2}, targets={"near": 0.98, "ghosts": 0.003, "recall": 0.96, "people": 0.9}
    ),
    "all but drift": Row(
        {"noise": SENSOR, "pose_noise": WHITE, "people": 2},
        targets={"near": 0.97, "ghosts": 0.004, "recall": 0.955, "people": 0.88},
    ),
}

IN_EVERY_ROW = {"leaks": 0.005, "false_free": 0.0005}
AT_MOST = ("ghosts", "leaks", "false_free")
RECALL_LOST, THIN_LOST = 0.003, 0.03
"""How far recall and thin may be below those of union on clean depth."""

KINECT = {"in_front": 0.08, "median": 0.01, "measured_found": 0.9}
"""Targets on real frames: maximum, maximum, minimum."""

COLUMNS = {
    "near": ("near", ".4f"),
    "exact": ("exact", ".3f"),
    "ghosts": ("ghosts", ".3%"),
    "recall": ("recall", ".4f"),
    "leaks": ("leaks", ".3%"),
    "false_free": ("false free", ".3%"),
    "false_free_alone": ("alone", ".3%"),
    "people": ("people", ".3f"),
    "thin": ("thin", ".3f"),
}

Table = dict[str, dict[str, dict[str, float]]]
"""Figures by row, method and name."""


@dataclass(frozen=True)
class Check:
    """A figure of our method and its target. most: whether the target is a maximum."""

    row: str
    name: str
    value: float
    target: float
    most: bool
    note: str = ""

    @property
    def met(self) -> bool:
        """Whether the figure meets the target."""
        return self.value <= self.target if self.most else self.value >= self.target


def checks(table: Table) -> Iterator[Check]:
    """Yield every figure of our method that has a target, in the measured rows.

    There are none if this version has only the union of all points.
    """
    for row, methods in table.items():
        ours = methods.get(OURS)
        if OURS == "union" or ours is None:
            continue
        for name, target in {**ROWS[row].targets, **IN_EVERY_ROW}.items():
            if name in ours:
                yield Check(row, name, ours[name], target, name in AT_MOST)
        union = methods.get("union")
        if row == "none":
            for name, lost in (("recall", RECALL_LOST), ("thin", THIN_LOST)):
                if union is not None and name in ours and name in union:
                    target = union[name] - lost
                    yield Check(row, name, ours[name], target, False, f"union's less {lost}")
            continue
        others = {name: f["near"] for name, f in methods.items() if name != OURS and "near" in f}
        if others and "near" in ours:
            best = max(others, key=others.__getitem__)
            yield Check(row, "near", ours["near"], others[best], False, f"{best}'s")


def print_table(table: Table, *, markdown: bool) -> None:
    """Print the figures, one line per row and method."""
    header = ["corruption", "method", *(title for title, _ in COLUMNS.values())]
    lines = [
        ["" if n else row, method, *_cells(found)]
        for row, methods in table.items()
        for n, (method, found) in enumerate(methods.items())
    ]
    _print(header, lines, markdown=markdown)


def _cells(found: dict[str, float]) -> list[str]:
    return [format(found[key], spec) if key in found else "" for key, (_, spec) in COLUMNS.items()]


def print_checks(found: list[Check], *, markdown: bool) -> None:
    """Print the figures of our method and their targets."""
    lines = []
    for check in found:
        spec = ".4%" if check.name in AT_MOST else ".4f"
        bound = "<=" if check.most else ">="
        target = f"{bound} {check.target:{spec}}{f' ({check.note})' if check.note else ''}"
        verdict = "met" if check.met else "MISSED"
        lines.append([check.row, check.name, f"{check.value:{spec}}", target, verdict])
    _print(["corruption", "figure", OURS, "target", ""], lines, markdown=markdown)


def print_details(table: Table, *, markdown: bool) -> None:
    """Print near and recall by range and by incidence, and the figures of free cells."""
    bins = sorted(
        {k for methods in table.values() for f in methods.values() for k in f if " " in k}
    )
    for name in ("near", "recall"):
        own = [label for label in bins if label.startswith(f"{name} ")]
        titles = [
            label.removeprefix(f"{name} ").replace("range ", "").replace("incidence ", "at ")
            + (" m" if "range" in label else " deg")
            for label in own
        ]
        lines = [
            [row, method, *(f"{found[label]:.4f}" if label in found else "" for label in own)]
            for row, methods in table.items()
            for method, found in methods.items()
        ]
        _print([f"{name} of", "method", *titles], lines, markdown=markdown)
    free = [
        [row, method, f"{found['hidden_free']:.3%}", f"{found['free_recall']:.4f}"]
        for row, methods in table.items()
        for method, found in methods.items()
        if "hidden_free" in found and "free_recall" in found
    ]
    _print(["free cells of", "method", "hidden", "recall"], free, markdown=markdown)


def _print(header: list[str], lines: list[list[str]], *, markdown: bool) -> None:
    print()
    if markdown:
        for line in (header, ["---"] * len(header), *lines):
            print(f"| {' | '.join(line)} |".replace("|  |", "| |"))
        return
    widths = [max(len(line[n]) for line in (header, *lines)) for n in range(len(header))]
    for line in (header, *lines):
        print(
            "  ".join(text.ljust(width) for text, width in zip(line, widths, strict=True)).rstrip()
        )
