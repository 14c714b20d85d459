"""A report on a built dataset as one HTML page without external resources."""

from __future__ import annotations

import base64
import hashlib
import io
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from occgen_hub.errors import OccGenError
from occgen_hub.files import leaves_folder, printable, read_jsonl
from occgen_hub.loading import Trajectory, built, trajectories
from occgen_hub.quality import Quality
from occgen_hub.visual.output_paths import atomic_output
from occgen_hub.visual.preview import cells_panel, from_above

FAILURES = "failures.jsonl"
PICTURED = 500
"""Largest number of trajectories with images, 40 kB each. Others are in the table only."""

THUMBNAIL = (400, 225)
SHEET = (480, 320)
"""Size of drawings in pixels: about as large as they are shown, so that text stays legible."""

QUALITY = 80
WORDS = 400
"""Largest number of characters shown of a task, a note or a reason."""


@dataclass
class Row:
    """A trajectory. values: by column; pictures: data URIs by title; the other fields are text."""

    id: str
    values: dict[str, float | None] = field(default_factory=dict)
    pictures: dict[str, str] = field(default_factory=dict)
    engine: str = ""
    task: str = ""
    notes: list[str] = field(default_factory=list)
    problem: str = ""


COLUMNS = {
    "frames": ("Frames", "{:,.0f}"),
    "occupied": ("Occupied per frame", "{:,.0f}"),
    "observed": ("Observed per frame, m\u00b3", "{:.2f}"),
    "share": ("Observed of grid, %", "{:.1f}"),
    "scene": ("Cells of the scene", "{:,.0f}"),
    "length": ("Path, m", "{:.2f}"),
    "moving": ("Moving per frame", "{:,.0f}"),
    "moving_share": ("Moving of occupied, %", "{:.1f}"),
    "scale": ("Scale", "{:.4g}"),
    "metres": ("Alignment off by, m", "{:.3f}"),
    "degrees": ("Alignment off by, degrees", "{:.2f}"),
    "inliers": ("Frames aligned, %", "{:.0f}"),
    "sigma_1": ("Depth noise at 1 m, mm", "{:.1f}"),
    "sigma_2": ("Depth noise at 2 m, mm", "{:.1f}"),
    "sigma_4": ("Depth noise at 4 m, mm", "{:.1f}"),
    "contradicted": ("Points contradicted, %", "{:.1f}"),
    "supports": ("Frames per point", "{:.0f}"),
    "residual": ("Scene off depth, mm", "{:.1f}"),
    "shift": ("Frames off scene, mm", "{:.1f}"),
    "turn": ("Frames off scene, degrees", "{:.2f}"),
}
"""Columns of the table: headings and number formats. Columns without any value are left out."""


def write_report(
    root: Path, place: Path, progress: Callable[[int, int], None] = lambda *_: None
) -> int:
    """Write a page about the dataset in `root`. Returns the number of its trajectories.

    Unreadable trajectories are listed with the reason. Raises UsageError if there is nothing to
    report, or `place` cannot be written.
    """
    failures = _failures(root)
    found = trajectories(root) if failures else built(root)
    rows = []
    for number, path in enumerate(found):
        rows.append(_row(path, _relative_name(path, root), pictured=number < PICTURED))
        progress(number + 1, len(found))
    with atomic_output(place) as partial:
        partial.write_text(_page(printable(root.resolve().name), rows, failures), "utf-8")
    return len(rows)


def _relative_name(path: Path, root: Path) -> str:
    return path.relative_to(root).as_posix() if path != root else path.resolve().name


def _failures(root: Path) -> list[dict[str, str]]:
    path = root / FAILURES
    if not path.is_file() or leaves_folder(path, root):
        return []
    return [
        {key: _shortened(line.get(key)) for key in ("episode", "reason")}
        for line in read_jsonl(path)
    ]


def _shortened(text: object) -> str:
    shown = printable("" if text is None else str(text))
    return shown if len(shown) <= WORDS else f"{shown[:WORDS]}\u2026"


def _row(path: Path, name: str, *, pictured: bool) -> Row:
    row = Row(printable(name))
    try:
        trajectory = Trajectory.open(path)
        _describe(row, trajectory)
        if pictured:
            row.pictures = {title: _uri(image) for title, image in _pictures(trajectory)}
    except OccGenError as error:
        row.problem = _shortened(error)
    return row


def _describe(row: Row, trajectory: Trajectory) -> None:
    poses, grid, record = trajectory.world_from_camera(), trajectory.grid, trajectory.record
    occupied = [len(columns) for columns in trajectory.visible_frames()]
    moving = [len(columns) for columns in trajectory.dynamic_frames()]
    bits = np.array([int(np.bitwise_count(row).sum()) for row in trajectory.observed_packed()])
    cells = float(bits.mean()) if len(bits) else 0.0
    scene = record["scene"]
    fit = scene.get("alignment")
    fit = fit if isinstance(fit, dict) else {}
    inliers, fitted = _number(fit.get("inliers")), _number(fit.get("frames"))
    steps = np.linalg.norm(np.diff(poses[:, :3, 3], axis=0), axis=1)
    row.values = {
        "frames": float(len(poses)),
        "occupied": float(np.mean(occupied)) if occupied else None,
        "observed": cells * grid.voxel_size**3,
        "share": 100 * cells / grid.cells,
        "scene": float(len(trajectory.scene_cells())),
        "length": float(steps.sum()),
        "scale": _number(scene.get("scale")) if scene.get("scale") != 1 else None,
        "metres": _number(fit.get("translation_rmse")),
        "degrees": _number(fit.get("rotation_error")),
        "inliers": 100 * inliers / fitted if inliers is not None and fitted else None,
        **_agreement(record),
    }
    if trajectory.has_dynamic():
        row.values["moving"] = float(np.mean(moving))
        row.values["moving_share"] = 100 * sum(moving) / max(sum(occupied), 1)
    row.engine = _shortened(record.get("engine"))
    row.task = _shortened(next(iter(trajectory.tasks()), ""))
    row.notes = [_shortened(note) for note in record["notes"][:20]]


def _agreement(record: dict[str, Any]) -> dict[str, float | None]:
    """How well the frames agree, if it is recorded."""
    quality = Quality.from_record(record)
    if quality is None:
        return {}
    one, two, four = (1000 * value for value in quality.sigma)
    return {
        **{"sigma_1": one, "sigma_2": two, "sigma_4": four},
        "contradicted": 100 * quality.contradicted,
        "supports": quality.supports,
        "residual": 1000 * quality.residual,
        "shift": 1000 * quality.shift,
        "turn": quality.turn,
    }


def _number(value: object) -> float | None:
    return float(value) if isinstance(value, int | float) and np.isfinite(value) else None


def _pictures(trajectory: Trajectory) -> Iterator[tuple[str, Image.Image | NDArray[np.uint8]]]:
    """Images of the middle frame with their titles."""
    frame = len(trajectory.world_from_camera()) // 2
    image = trajectory.rgb(frame)
    if image is not None:
        yield "image", image
    yield "from above", from_above(trajectory, frame, SHEET)
    yield "occupied, from the camera", cells_panel(trajectory, frame, SHEET)


def _uri(picture: Image.Image | NDArray[np.uint8]) -> str:
    """A data URI: drawings as PNG with 255 colours, images as JPEG of size THUMBNAIL."""
    content = io.BytesIO()
    if isinstance(picture, Image.Image):
        kind = "png"
        picture.quantize(255, Image.Quantize.MAXCOVERAGE, dither=Image.Dither.NONE).save(
            content, "PNG", optimize=True
        )
    else:
        kind, image = "jpeg", Image.fromarray(picture)
        image.thumbnail(THUMBNAIL, Image.Resampling.LANCZOS)
        image.save(content, "JPEG", quality=QUALITY)
    return f"data:image/{kind};base64,{base64.b64encode(content.getvalue()).decode()}"


def _page(name: str, rows: list[Row], failures: list[dict[str, str]]) -> str:
    """The HTML page. All data are escaped, and no other script may run in it."""
    from jinja2 import Environment, StrictUndefined
    from markupsafe import Markup

    columns = {
        key: column
        for key, column in COLUMNS.items()
        if any(row.values.get(key) is not None for row in rows)
    }
    folder = files("occgen_hub.visual")
    script = (folder / "report.js").read_text("utf-8")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    template = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True)
    return template.from_string((folder / "report.html").read_text("utf-8")).render(
        name=name,
        rows=rows,
        failures=failures,
        columns=columns,
        engines=any(row.engine for row in rows),
        notes=any(row.notes for row in rows),
        totals=_totals(rows, failures),
        pictured=PICTURED,
        script=Markup(script),  # our own
        digest=digest,
        shown=_shown,
    )


def _shown(row: Row, key: str) -> str:
    value = row.values.get(key)
    return "" if value is None else COLUMNS[key][1].format(value)


def _totals(rows: list[Row], failures: list[dict[str, str]]) -> dict[str, Any]:
    sound = [row for row in rows if not row.problem]

    def total(key: str) -> float:
        return sum(row.values.get(key) or 0 for row in sound)

    frames = total("frames")
    occupied = sum((r.values["occupied"] or 0) * (r.values["frames"] or 0) for r in sound)
    return {
        "trajectory" if len(rows) == 1 else "trajectories": f"{len(rows):,}",
        "frames": f"{frames:,.0f}",
        "path, m": f"{total('length'):,.2f}",
        "occupied cells per frame": f"{occupied / frames if frames else 0:,.0f}",
        "failed": f"{len(failures):,}",
        "not readable": f"{len(rows) - len(sound):,}",
    }
