"""The dataset card: a README.md at the root of a dataset, as the Hugging Face Hub reads it.

All that it says is taken from the trajectories' own meta files, so that the same trajectories have
the same card, wherever they lie.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import yaml
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from occgen_hub.atomic import atomic_file
from occgen_hub.engines.weights import COMMERCIAL
from occgen_hub.errors import DatasetError, OccGenError, UsageError
from occgen_hub.files import (
    dump_json,
    leads_out,
    printable,
    read_bytes,
    sha256,
)
from occgen_hub.fusion.quality import Quality
from occgen_hub.lerobot.exported import RECORD
from occgen_hub.loading import NOT_BUILT, REBUILD, SCHEMA, Trajectory, trajectories
from occgen_hub.schema import Feature, Schema, load_schema
from occgen_hub.shards import FOLDER, shards
from occgen_hub.visual.preview import preview

CARD = "README.md"
PICTURE = "preview.png"
MARK = "<!-- Written by occgen-hub; take this line out to keep a card of your own. -->"
"""By this line a card is known as ours, which may be written anew."""

TAGS = ["LeRobot", "occupancy", "4d-occupancy", "voxels", "depth", "navigation", "occgen-hub"]
SIZES = ("n<1K", "1K<n<10K", "10K<n<100K", "100K<n<1M", "1M<n<10M", "10M<n<100M", "100M<n<1B")
NON_COMMERCIAL = re.compile(r"cc-by-nc(-sa|-nd)?-\d\.\d")
"""Licences of weights that bind what is made with them, by the Hub's names."""

_DRAWN = "occgen"
"""The text in a picture that says what it was drawn from; one without it is a user's own."""


@dataclass
class Facts:
    """What a card says of a dataset.

    features: the columns that all trajectories have alike; partial: the names of the others; grids:
    shape, voxel_size (metres) and pc_range (metres) of each that there is; records: what else was
    found in the trajectories' records, by key, as JSON; licences: of weights, by network; quality:
    of each trajectory that has it; moving: how many trajectories have cells that move.
    """

    trajectories: int = 0
    frames: int = 0
    scenes: set[str] = field(default_factory=set)
    features: dict[str, Feature] = field(default_factory=dict)
    partial: set[str] = field(default_factory=set)
    grids: set[tuple[tuple[int, ...], float, tuple[float, ...]]] = field(default_factory=set)
    records: dict[str, set[str]] = field(default_factory=dict)
    licences: set[tuple[str, str]] = field(default_factory=set)
    quality: list[Quality] = field(default_factory=list)
    moving: int = 0


def write_card(root: Path) -> Path:
    """Write `root`/README.md and its picture, where they are not what they should be already.

    A README.md that a user wrote is left as it is (see `is_own`). The picture is one of the first
    trajectory; where it cannot be drawn, the card goes without. Returns the card's path. Raises
    UsageError when `root` holds no trajectories, SourceError when one cannot be read, and OSError.
    """
    card = root / CARD
    if not is_own(card):
        return card
    found = trajectories(root)
    if not found or found == [root]:
        raise UsageError(f"{root}: holds no trajectories; {NOT_BUILT}.")
    names = sorted((path.relative_to(root).as_posix(), path) for path in found)
    facts = survey(names)
    picture = _picture(root / PICTURE, names[0][1])
    parts = (
        _front_matter(facts, _configs(facts, load_schema(SCHEMA), occupancy=bool(shards(root)))),
        *_introduction(facts, picture=picture),
        *_examples(names[0][0], load_schema(SCHEMA), occupancy=bool(shards(root))),
        *_columns(facts.features),
        *_partial(facts),
        *_grids(facts),
        *_quality(facts),
        *_origin(facts, RECORDS),
    )
    text = ("\n".join(parts) + "\n").encode()
    if not card.exists() or card.read_bytes() != text:
        with atomic_file(card) as partial:
            partial.write_bytes(text)
    return card


def write_export_card(
    out: Path, facts: Facts, features: dict[str, dict[str, Any]], remarks: tuple[str, ...]
) -> Path:
    """Write `out`/README.md for an export of the dataset that has these facts.

    features: of the LeRobot dataset, as info.json has them; remarks: on what differs from the
    dataset. Returns the card's path. Raises OSError.
    """
    schema = load_schema(SCHEMA)
    configs = [_config("default", "data/*/*.parquet"), _config(FOLDER, f"{FOLDER}/*.parquet")]
    shown = {name: Feature.model_validate(_plain(feature)) for name, feature in features.items()}
    parts = (
        _front_matter(facts, configs),
        *_introduction(facts, picture=(out / PICTURE).is_file(), layout=_ONE_DATASET),
        *_export_examples(schema),
        *_columns(shown),
        *(f"In the export, {remark}.\n" for remark in remarks),
        *_grids(facts),
        *_quality(facts),
        *_origin(facts, EXPORT_RECORD),
    )
    with atomic_file(out / CARD) as partial:
        partial.write_text("\n".join(parts) + "\n", encoding="utf-8")
    return out / CARD


def _plain(feature: dict[str, Any]) -> dict[str, Any]:
    """What a feature's line in the table tells."""
    return {"dtype": feature["dtype"], "shape": feature["shape"]}


def is_own(card: Path) -> bool:
    """Whether a card may be written there: there is none, or one that bears our mark."""
    if leads_out(card, card.parent):
        return False
    if not card.exists() and not card.is_symlink():
        return True
    try:
        return MARK.encode() in read_bytes(card)
    except OccGenError:
        return False


def survey(names: list[tuple[str, Path]]) -> Facts:
    """The facts of trajectories, given by their ids and folders, from their meta files."""
    facts = Facts()
    for name, path in names:
        trajectory = Trajectory.open(path)
        features, frames = _declared(trajectory)
        if not facts.trajectories:
            facts.features = features
        shared = {k: v for k, v in facts.features.items() if features.get(k) == v}
        facts.partial |= (set(facts.features) | set(features)) - set(shared)
        facts.features = shared
        facts.trajectories += 1
        facts.frames += frames
        facts.scenes.add(name.rpartition("/")[0])
        grid = trajectory.grid
        facts.grids.add((grid.shape, grid.voxel_size, tuple(trajectory.record["grid"]["pc_range"])))
        record = {**trajectory.record, "source": trajectory.record["source"].get("builder")}
        for key in ("source", "engine", "config", "version"):
            if record.get(key) is not None:
                facts.records.setdefault(key, set()).add(dump_json(record[key]))
        facts.moving += trajectory.has_dynamic()
        if (quality := Quality.from_record(trajectory.record)) is not None:
            facts.quality.append(quality)
        if isinstance(weights := record.get("weights"), dict):
            facts.licences.add((str(weights.get("network")), str(weights.get("license"))))
    return facts


def _declared(trajectory: Trajectory) -> tuple[dict[str, Feature], int]:
    """The features and the number of frames that a trajectory's info.json declares."""
    try:
        info = trajectory.info()
        features = {k: Feature.model_validate(v) for k, v in dict(info["features"]).items()}
        return features, int(info["total_frames"])
    except (KeyError, TypeError, ValueError):
        problem = "does not say its features and frames"
        raise DatasetError(trajectory.file("info"), problem, REBUILD) from None


# The picture


def _picture(place: Path, path: Path) -> bool:
    """Have a picture of a trajectory at `place`; whether there is one. A user's own is left.

    So is a link out of the dataset, which does not count as one.
    """
    if leads_out(place, place.parent):
        return False
    trajectory = Trajectory.open(path)
    origin = sha256(trajectory.file("record"))
    if place.exists():
        drawn = _drawn_from(place)
        if drawn in (None, origin):
            return True
    try:
        image = preview(trajectory)
    except (OccGenError, OSError, ValueError, MemoryError):
        with suppress(FileNotFoundError):
            place.unlink()
        return False
    said = PngInfo()
    said.add_text(_DRAWN, origin)
    with atomic_file(place) as partial:
        image.save(partial, "PNG", pnginfo=said)
    return True


def _drawn_from(place: Path) -> str | None:
    """What our picture was drawn from; None for one that is not ours."""
    try:
        with Image.open(place) as image:
            return getattr(image, "text", {}).get(_DRAWN)
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
        return None


# The words

_TRAJECTORIES = (
    "; for every trajectory the occupied cells and the cloud of the whole scene. Each trajectory, "
    "`<group>/<scene>/<trajectory>/`, is a LeRobot v2.1 dataset by itself."
)
_ONE_DATASET = (
    ". All trajectories are one LeRobot v3.0 dataset, an episode each; the occupancy lies beside "
    "it, row by row in the order of its frames."
)


def _front_matter(facts: Facts, configs: list[dict[str, Any]]) -> str:
    """What the Hub reads: the licence, tags, and where `load_dataset` finds which table."""
    bound = sorted({licence for _, licence in facts.licences if NON_COMMERCIAL.fullmatch(licence)})
    licence: dict[str, Any] = {"license": "other", "license_name": "that-of-the-source"}
    if bound:
        licence = {"license": bound[0] if len(bound) == 1 else bound}
    size = min(max(len(str(facts.frames)) - 3, 0), len(SIZES) - 1)
    matter = {
        **licence,
        "pretty_name": "4D occupancy, built by OccGen Hub",
        "task_categories": ["robotics"],
        "tags": TAGS,
        "size_categories": [SIZES[size]],
        "configs": configs,
    }
    return f"---\n{yaml.safe_dump(matter, sort_keys=False, width=100)}---\n\n{MARK}\n"


def _configs(facts: Facts, schema: Schema, *, occupancy: bool) -> list[dict[str, Any]]:
    """Which files `load_dataset` finds under which name."""
    frames = re.sub(r"\{[^}]*\}", "*", schema.files["frames"].path)
    configs = [_config("default", f"**/{frames}")]
    if facts.partial:  # `datasets` wants one schema, and would refuse the table.
        configs[0]["columns"] = list(facts.features)
    if occupancy:
        configs.append(_config(FOLDER, f"{FOLDER}/*.parquet"))
    return configs


def _config(name: str, path: str) -> dict[str, Any]:
    return {"config_name": name, "data_files": [{"split": "train", "path": path}]}


def _introduction(facts: Facts, *, picture: bool, layout: str = _TRAJECTORIES) -> Iterator[str]:
    yield "# 4D occupancy\n"
    yield (
        f"{_count(facts.frames, 'frame')} of {_count(facts.trajectories, 'trajectory')} in "
        f"{_count(len(facts.scenes), 'scene')}. For every frame: the occupied cells that the "
        "camera sees, all the cells that it observed, free and occupied alike, its pose and its "
        f"intrinsics{layout}\n"
    )
    if picture:
        yield f"![A frame: image, depth, visible occupied cells, scene from above]({PICTURE})\n"


def _examples(first: str, schema: Schema, *, occupancy: bool) -> Iterator[str]:
    """A way to load each thing; the tests run them."""
    yield "## Load it\n"
    yield "`DATASET` stands for this dataset's name on the Hub, or for a folder that holds it.\n"
    yield "The frames of all trajectories: poses, intrinsics, time, episode and scene.\n"
    yield _python(f"""\
from datasets import load_dataset

frames = load_dataset("DATASET", split="train").with_format("numpy")
world_from_camera = frames[0]["{schema.poses}"]  # (4, 4), OpenCV axes, metres
K = frames[0]["{schema.intrinsics}"]  # (3, 3), pixels
""")
    if occupancy:
        yield from _occupancy_examples()
    yield (
        "LeRobot: `occgen-hub export DATASET lerobot` makes one LeRobot v3.0 dataset of it, with "
        "images, depth, tasks and occupancy. LeRobot up to 0.3 reads a trajectory as it is here: "
        f"`LeRobotDataset(NAME, root={dump_json(f'DATASET/{printable(first)}')}, episodes=[0])`.\n"
    )
    yield "The files of one trajectory, from a folder that holds the dataset:\n"
    yield _python(f"""\
import numpy as np
from scipy import sparse

folder = "DATASET/" + {dump_json(printable(first))}
visible = sparse.load_npz(f"{{folder}}/{schema.path("visible")}")
mask = np.load(f"{{folder}}/{schema.path("observed")}")
shape = tuple(mask["shape"])
occupied = visible[0].toarray().reshape(shape).astype(bool)
observed = np.unpackbits(mask["data"][0], count=occupied.size).reshape(shape).astype(bool)
""")


def _occupancy_examples() -> Iterator[str]:
    yield "Occupancy frame by frame, streamed, with nothing else installed:\n"
    yield _python("""\
import numpy as np
from datasets import load_dataset

rows = load_dataset("DATASET", "occupancy", split="train", streaming=True)
for row in rows:
    shape = tuple(row["shape"])
    occupied = np.zeros(shape, bool)
    occupied.reshape(-1)[row["occupied"]] = True  # i * ny * nz + j * nz + k
    packed = np.frombuffer(row["observed"], np.uint8)
    observed = np.unpackbits(packed, count=occupied.size).reshape(shape).astype(bool)
    free = observed & ~occupied

    in_camera = np.array(row["pc_range"][:3]) + (np.argwhere(occupied) + 0.5) * row["voxel_size"]
    world_from_camera = np.array(row["camera_extrinsic"])
    in_world = in_camera @ world_from_camera[:3, :3].T + world_from_camera[:3, 3]
""")
    yield (
        "Read a stream to its end: a script that leaves one early may not end, for a fault of "
        "pyarrow's (apache/arrow#45214). For single frames leave `streaming=True` out.\n"
    )
    yield "Tensors for training, with the history of each frame, where OccGen Hub is installed:\n"
    yield _python("""\
from occgen_hub import OccupancyDataset

dataset = OccupancyDataset("DATASET", keys=("occupancy", "mask", "pose", "history"))
item = dataset[0]
""")


def _export_examples(schema: Schema) -> Iterator[str]:
    yield "## Load it\n"
    yield "`DATASET` stands for this dataset's name on the Hub.\n"
    yield "With LeRobot, images and tasks and all:\n"
    yield _python(f"""\
from lerobot.datasets.lerobot_dataset import LeRobotDataset

frames = LeRobotDataset("DATASET")
world_from_camera = frames[0]["{schema.poses}"]  # (4, 4), OpenCV axes, metres
""")
    yield "With the occupancy in its items, where OccGen Hub is installed:\n"
    yield _python(f"""\
from occgen_hub import LeRobotOccupancyDataset

frames = LeRobotOccupancyDataset("DATASET")
occupied = frames[0]["{schema.folder("visible")}"]  # (nx, ny, nz) bool
observed = frames[0]["{schema.folder("observed")}"]  # (nx, ny, nz) bool
""")
    yield from _occupancy_examples()


def _columns(features: dict[str, Feature]) -> Iterator[str]:
    yield "## What is in it\n"
    yield "The columns of the frames:\n"
    yield "| column | type | shape |\n| --- | --- | --- |"
    for name, feature in features.items():
        yield f"| `{name}` | {feature.dtype} | {_by(feature.shape)} |"
    yield ""


def _partial(facts: Facts) -> Iterator[str]:
    if facts.partial:
        yield (
            "Not all trajectories have, or have alike, and so only their own files hold: "
            f"{', '.join(f'`{name}`' for name in sorted(facts.partial))}.\n"
        )
    yield "`task_index` counts the tasks of the row's own trajectory, in its `meta/tasks.jsonl`.\n"


def _grids(facts: Facts) -> Iterator[str]:
    for shape, voxel_size, pc_range in sorted(facts.grids):
        yield (
            f"The grid: {_by(shape)} cells of {voxel_size} m, in the camera's frame (x right, y "
            f"down, z forward), from {pc_range[:3]} to {pc_range[3:]} m. Cell (i, j, k) "
            "is the half-open box that starts at `pc_range[:3] + voxel_size * (i, j, k)`.\n"
        )
    yield (
        "A cell is occupied if a point of the scene's cloud lies in it; it is observed if the ray "
        "of a pixel's centre crosses it before or at the ray's first occupied cell. Occupied cells "
        "that the camera does not see are not in a frame's occupancy.\n"
    )


def _quality(facts: Facts) -> Iterator[str]:
    """How well the frames agree, and what moves."""
    if facts.moving:
        yield (
            f"Something moves in {_count(facts.moving, 'trajectory')}: `dynamic`, beside the "
            "occupied cells, has those of them that hold it.\n"
        )
    if facts.quality:
        each = facts.quality
        noise = ", ".join(f"{1000 * median(q.sigma[n] for q in each):.1f}" for n in range(3))
        yield (
            "How well frames agree, as medians over the trajectories: depth noise "
            f"{noise} mm at 1, 2, 4 m; {median(q.contradicted for q in each):.1%} of the measured "
            "points seen through by other frames; the scene "
            f"{1000 * median(q.residual for q in each):.1f} mm off the measured depth; frames "
            f"{1000 * median(q.shift for q in each):.1f} mm and "
            f"{median(q.turn for q in each):.2f} degrees off the scene.\n"
        )


RECORDS = "Each trajectory's `meta/occgen.json` says how,"
EXPORT_RECORD = f"`{RECORD}` says which trajectory each episode is,"


def _origin(facts: Facts, records: str) -> Iterator[str]:
    """How it was built, and what may be done with it."""
    told = {key: ", ".join(_said(v) for v in sorted(facts.records.get(key, ()))) for key in
            ("source", "engine", "version")}  # fmt: skip
    yield "## How it was built\n"
    yield (
        f"By OccGen Hub {told['version']}, from the source "
        f"{told['source']}, with the engine {told['engine']}. {records} "
        "and a SHA-256 of every file; `occgen-hub validate` checks them all.\n"
    )
    configs = sorted(facts.records.get("config", ()))
    if len(configs) == 1:
        yield f"```json\n{configs[0]}\n```\n"
    yield "## Licence\n"
    yield (
        "What was recorded keeps the licence of its source, which has to be looked up there. "
        "OccGen Hub itself asks for nothing."
    )
    for network, licence in sorted(facts.licences):
        said = f"{network}, whose weights are under the licence {licence}"
        if licence in COMMERCIAL:
            yield f"\nThe occupancy was reconstructed by {said}, which allows commercial use."
            continue
        forbids = ", which allows no commercial use" if "-nc" in licence.lower() else ""
        yield (
            f"\nThe occupancy was reconstructed by {said}{forbids}: that holds for this dataset as "
            "well."
        )


def _python(code: str) -> str:
    return f"```python\n{code}```\n"


def _by(shape: tuple[int, ...]) -> str:
    return " x ".join(map(str, shape))


def _count(number: int, what: str) -> str:
    many = what.removesuffix("y") + "ies" if what.endswith("y") else f"{what}s"
    return f"{number:,} {what if number == 1 else many}"


def _said(value: str) -> str:
    """A string of a record, from its JSON."""
    return f"`{value.strip(chr(34))}`"
