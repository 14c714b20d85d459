"""Taxonomies: the classes of labels, by their ids; see schemas/taxonomies.yaml."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from importlib import resources
from typing import Any

import numpy as np
import yaml
from numpy.typing import NDArray

from occgen_hub.errors import UsageError

UNLABELLED = 254
"""The class of an occupied cell for which no frame gives a class."""


@dataclass(frozen=True)
class Class:
    """A class. color: RGB, 0 to 255; occscannet11: the id of OccScanNet's class for it."""

    id: int
    name: str
    color: tuple[int, int, int]
    occscannet11: int


@dataclass(frozen=True)
class Taxonomy:
    """Classes by id, 1 to 253. void: ids of pixels without a class, in addition to 0."""

    name: str
    classes: dict[int, Class]
    void: tuple[int, ...] = ()

    def id_of(self, name: str) -> int:
        """The id of the class with that name. Raises KeyError."""
        return {one.name: one.id for one in self.classes.values()}[name]

    def checked(self, image: NDArray[Any]) -> NDArray[np.uint8]:
        """(H, W) uint8 classes of the pixels of a label image, 0 for none.

        Raises ValueError unless all pixels are integers and ids of this taxonomy.
        """
        if image.dtype.kind not in "iu":
            raise ValueError(f"has pixels of {image.dtype}, not whole numbers")
        low, high = int(image.min(initial=0)), int(image.max(initial=0))
        strange = low if low < 0 else high
        if low >= 0 and high < 256:
            classes: NDArray[np.uint8] = self._pixels[image]
            bad = np.flatnonzero(classes.ravel() == _NO_CLASS)
            if not len(bad):
                return classes
            strange = int(image.ravel()[bad[0]])
        raise ValueError(f"has the id {strange}, which is not a class of {self.name}")

    @property
    def _pixels(self) -> NDArray[np.uint8]:
        """(256,) uint8: the class of each id of a label image, 0 for void, `_NO_CLASS` for none."""
        table = np.full(256, _NO_CLASS, np.uint8)
        table[[*self.classes]] = [*self.classes]
        table[[0, *self.void]] = 0
        return table

    def known(self) -> NDArray[np.bool_]:
        """(256,) bool: which numbers are classes of cells: the ids, and UNLABELLED."""
        known = np.zeros(256, np.bool_)
        known[[*self.classes, UNLABELLED]] = True
        return known

    def to_occscannet(self, unlabelled: int) -> NDArray[np.uint8]:
        """(256,) uint8: OccScanNet's class for each class of cells; 0 and 255 do not change.

        unlabelled: the value for UNLABELLED.
        """
        table = np.zeros(256, np.uint8)
        for one in self.classes.values():
            table[one.id] = one.occscannet11
        table[[UNLABELLED, 255]] = unlabelled, 255
        return table


_NO_CLASS = 255


def taxonomy_names() -> list[str]:
    """The names of the taxonomies."""
    return sorted(_taxonomies())


def load_taxonomy(name: str) -> Taxonomy:
    """The taxonomy with that name. Raises UsageError if there is none."""
    found = _taxonomies().get(name)
    if found is None:
        known = ", ".join(taxonomy_names())
        raise UsageError(f"{name[:80]!r}: is not a taxonomy; choose one of {known}.")
    return found


@cache
def _taxonomies() -> dict[str, Taxonomy]:
    file = resources.files("occgen_hub.schemas") / "taxonomies.yaml"
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    content = yaml.load(file.read_text(encoding="utf-8"), Loader=loader)  # safe
    targets = {c["name"]: number for number, c in content["occscannet11"]["classes"].items()}
    return {
        name: Taxonomy(
            name,
            {
                number: Class(
                    number,
                    entry["name"],
                    _rgb(entry["color"]),
                    targets[entry.get("occscannet11", entry["name"])],
                )
                for number, entry in found["classes"].items()
            },
            tuple(found["void"]),
        )
        for name, found in content.items()
    }


def _rgb(text: str) -> tuple[int, int, int]:
    red, green, blue = bytes.fromhex(text.removeprefix("#"))
    return red, green, blue
