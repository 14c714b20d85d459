"""The dataset card: a README.md at the root of a dataset, as the Hugging Face Hub reads it.

It is written from the index only, so the same trajectories have the same card, even if only a part
of the dataset is on this disk.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from statistics import median
from typing import Any

import yaml
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from occgen_hub.atomic import atomic_file
from occgen_hub.errors import OccGenError, UsageError, one_line
from occgen_hub.files import (
    dump_json,
    has_content,
    is_file,
    leaves_folder,
    printable,
    read_bytes,
    sha256,
)
from occgen_hub.index import INDEX, OPTIONAL, Entry, entries, parts, read_part
from occgen_hub.index import SCHEMA as INDEX_SCHEMA
from occgen_hub.lerobot.export_check import RECORD
from occgen_hub.loading import NOT_BUILT, SCHEMA, Trajectory
from occgen_hub.plugins import load_plugin
from occgen_hub.quality import Quality
from occgen_hub.scene_states import COLUMNS as STATE_COLUMNS
from occgen_hub.scene_states import FOLDER as STATES
from occgen_hub.schema import Feature, Schema, load_schema
from occgen_hub.shards import FOLDER, column_names
from occgen_hub.taxonomy import UNLABELLED, load_taxonomy
from occgen_hub.visual.preview import preview

CARD = "README.md"
PICTURE = "preview.png"
MARK = "<!-- Written by occgen-hub; take this line out to keep a card of your own. -->"
"""This line marks a card that we wrote and may replace."""

TAGS = ["occupancy", "4d-occupancy", "voxels", "depth", "navigation", "occgen-hub"]
SIZES = ("n<1K", "1K<n<10K", "10K<n<100K", "100K<n<1M", "1M<n<10M", "10M<n<100M", "100M<n<1B")
NON_COMMERCIAL = re.compile(r"cc-by-nc(-sa|-nd)?-\d\.\d")
"""Licences of weights, by the Hub's names, that also apply to results made with the weights."""

UNSTATED = "that-of-the-source"
"""The name of the licence if the source states none."""

_DRAWN = "occgen"
"""Key of the text in a picture that names its source. Pictures without it are a user's own."""


@dataclass
class Facts:
    """What a card states about a dataset.

    features: the columns that all trajectories share; partial: the names of the others; grids:
    shape, voxel_size (metres) and pc_range (metres) of each grid; records: other values of the
    trajectories' records, by key, as JSON; licences: (network, licence of its weights); quality: of
    each trajectory that has it; moving: number of trajectories with moving cells; splits: number
    of trajectories in each split; source_licences: of the recordings, None if the source states
    none; first: the first trajectory by name; occupancy: whether any has shards; packed: whether
    all are only in shards; taxonomies: number of trajectories with labels of each.
    """

    first: str = ""
    occupancy: bool = False
    packed: bool = True
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
    splits: dict[str, int] = field(default_factory=dict)
    source_licences: set[str | None] = field(default_factory=set)
    taxonomies: dict[str, int] = field(default_factory=dict)


def write_card(root: Path, shown: Path | None = None) -> Path:
    """Write `root`/README.md and its picture, unless they are up to date.

    A README.md that a user wrote is kept (see `is_own`). The picture shows the first trajectory,
    or the one in the folder `shown`. If it cannot be drawn, the card has none. Returns the card's
    path. Raises UsageError if `root` has no trajectories, SourceError if one cannot be read, and
    OSError.
    """
    card = root / CARD
    if not is_own(card):
        return card
    facts = survey(row for part in parts(root) for row in entries(read_part(part)))
    if not facts.trajectories:
        raise UsageError(f"{root}: has no index with trajectories; {NOT_BUILT}.")
    schema = load_schema(SCHEMA)
    picture = _picture(root / PICTURE, shown or root / facts.first)
    paragraphs = (
        _front_matter(facts, _configs(facts, schema), lerobot=not facts.packed),
        *_introduction(facts, picture=picture, layout=_PACKED if facts.packed else _TRAJECTORIES),
        *_splits(facts),
        *(_packed_examples(facts) if facts.packed else _examples(facts, schema)),
        *(() if facts.packed else (*_columns(facts.features), *_partial(facts))),
        *_media(facts, schema),
        *_grids(facts),
        *_classes(facts),
        *_quality(facts),
        *_origin(facts, IN_INDEX if facts.packed else RECORDS),
    )
    text = ("\n".join(paragraphs) + "\n").encode()
    if not has_content(card, text):
        with atomic_file(card) as partial:
            partial.write_bytes(text)
    return card


def write_export_card(
    out: Path, facts: Facts, features: dict[str, dict[str, Any]], remarks: tuple[str, ...]
) -> Path:
    """Write `out`/README.md for an export of the dataset with these facts.

    features: of the LeRobot dataset, as in info.json; remarks: on differences from the dataset.
    Returns the card's path. Raises OSError.
    """
    schema = load_schema(SCHEMA)
    configs = [_config("default", "data/*/*.parquet"), _config(FOLDER, f"{FOLDER}/*/*.parquet")]
    configs = _without_labels(facts, [*configs, _config(INDEX, f"{INDEX}/*.parquet")])
    shown = {name: Feature.model_validate(_plain(feature)) for name, feature in features.items()}
    parts = (
        _front_matter(facts, configs, lerobot=True),
        *_introduction(facts, picture=(out / PICTURE).is_file(), layout=_ONE_DATASET),
        *_export_examples(facts, schema, features),
        *_columns(shown),
        *(f"In the export, {remark}.\n" for remark in remarks),
        *_grids(facts),
        *_classes(facts),
        *_quality(facts),
        *_origin(facts, EXPORT_RECORD),
    )
    with atomic_file(out / CARD) as partial:
        partial.write_text("\n".join(parts) + "\n", encoding="utf-8")
    return out / CARD


def write_frames_card(out: Path, facts: Facts, layout: str, remarks: Iterable[str]) -> Path:
    """Write `out`/README.md for an export with one file per frame, see `frame_exports`.

    layout: a description of the files, in Markdown; remarks: on differences from the dataset.
    Returns the card's path. Raises OSError.
    """
    parts = (
        _front_matter(facts, [], lerobot=False),
        *_introduction(facts, picture=False, layout=_FRAME_FILES),
        "## Contents\n",
        layout,
        *(f"In the export, {remark}.\n" for remark in remarks),
        *_quality(facts),
        *_origin(facts, EXPORT_RECORD),
    )
    with atomic_file(out / CARD) as partial:
        partial.write_text("\n".join(parts) + "\n", encoding="utf-8")
    return out / CARD


def _plain(feature: dict[str, Any]) -> dict[str, Any]:
    """What the table of columns shows of a feature."""
    return {"dtype": feature["dtype"], "shape": feature["shape"]}


def is_own(card: Path) -> bool:
    """Whether a card may be written there: there is none, or it has our mark."""
    if leaves_folder(card, card.parent):
        return False
    if not card.exists() and not card.is_symlink():
        return True
    try:
        return MARK.encode() in read_bytes(card)
    except OccGenError:
        return False


def survey(rows: Iterable[Entry]) -> Facts:
    """The facts of trajectories, from their rows of the index."""
    facts = Facts()
    for row in rows:
        features = _features(row.features)
        if not facts.trajectories:
            facts.features = features
        shared = {k: v for k, v in facts.features.items() if features.get(k) == v}
        facts.partial |= (set(facts.features) | set(features)) - set(shared)
        facts.features = shared
        facts.first = min(facts.first or row.episode, row.episode)
        facts.occupancy |= bool(row.shards)
        facts.packed &= not row.files
        facts.trajectories += 1
        facts.frames += row.frames
        facts.scenes.add(row.scene)
        facts.splits[row.split] = facts.splits.get(row.split, 0) + 1
        facts.grids.add((row.shape, row.voxel_size, row.pc_range))
        for key, value in (
            ("source", row.builder),
            ("engine", row.engine),
            ("version", row.version),
        ):
            facts.records.setdefault(key, set()).add(dump_json(value))
        facts.records.setdefault("config", set()).add(row.config)
        facts.moving += row.moving
        if row.taxonomy is not None:
            facts.taxonomies[row.taxonomy] = facts.taxonomies.get(row.taxonomy, 0) + 1
        if (quality := row.agreement) is not None:
            facts.quality.append(quality)
        if row.network is not None:
            facts.licences.add((row.network, str(row.licence)))
        facts.source_licences.add(row.source_licence)
    return facts


@lru_cache(64)
def _features(text: str) -> dict[str, Feature]:
    """The features of a row of the index. Cached, because most rows have the same."""
    return {k: Feature.model_validate(v) for k, v in json.loads(text).items()}


# The picture


def _picture(place: Path, path: Path) -> bool:
    """Draw a picture of a trajectory at `place`. Returns whether there is one.

    A user's own picture is kept. A link out of the dataset and a folder are kept, but do not count.
    """
    if leaves_folder(place, place.parent) or place.is_dir():
        return False
    if not path.is_dir():  # Only a part of the dataset is here.
        return is_file(place)
    trajectory = Trajectory.open(path)
    origin = sha256(trajectory.file("record"))
    if is_file(place):  # A pipe would never end; it is replaced.
        drawn = _drawn_from(place)
        if drawn in (None, origin):
            return True
    try:
        image = preview(trajectory)
    except (OccGenError, OSError, ValueError, MemoryError):
        with suppress(FileNotFoundError):
            place.unlink()
        return False
    metadata = PngInfo()
    metadata.add_text(_DRAWN, origin)
    with atomic_file(place) as partial:
        image.save(partial, "PNG", pnginfo=metadata)
    return True


def _drawn_from(place: Path) -> str | None:
    """The source of our picture. None if the picture is not ours."""
    try:
        with Image.open(place) as image:
            return getattr(image, "text", {}).get(_DRAWN)
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
        return None


# The text

_OBSERVED = (
    "the occupied cells that the camera sees, all the free and occupied cells that it observed, "
    "its pose and its intrinsics"
)
_TRAJECTORIES = (
    f"{_OBSERVED}; for every trajectory the occupied cells and the cloud of the whole scene. Each "
    "trajectory, `<group>/<scene>/<trajectory>/`, is a LeRobot v2.1 dataset by itself."
)
_FRAME_FILES = (
    "its image, pose and intrinsics, and the states of the scene's cells around the camera: "
    "occupied, free or unknown, including hidden cells."
)
_PACKED = (
    f"{_OBSERVED}, its image, depth and task. The Parquet files `occupancy/*/*.parquet` have a row "
    "per frame. Each file belongs to one scene."
)
_ONE_DATASET = (
    f"{_OBSERVED}. Together, the trajectories are one LeRobot v3.0 dataset with an episode for "
    "each. The occupancy is stored beside it."
)


def states_no_license(root: Path) -> bool:
    """Whether the card of a dataset or an export says that the licence is that of the source."""
    try:
        head = read_bytes(root / CARD)[:2000]
    except OccGenError:
        return False
    return f"\nlicense_name: {UNSTATED}\n".encode() in head


def _front_matter(facts: Facts, configs: list[dict[str, Any]], *, lerobot: bool) -> str:
    """The metadata for the Hub: licence, tags, and the files of each `load_dataset` config.

    lerobot: whether LeRobot can read the files.
    """
    bound = sorted({licence for _, licence in facts.licences if NON_COMMERCIAL.fullmatch(licence)})
    licence: dict[str, Any] = {"license": "other", "license_name": UNSTATED}
    known = {licence for licence in facts.source_licences if licence}
    if None not in facts.source_licences:
        bound = sorted({*bound, *known})
    if bound:
        licence = {"license": bound[0] if len(bound) == 1 else bound}
    size = min(max(len(str(facts.frames)) - 3, 0), len(SIZES) - 1)
    matter = {
        **licence,
        "pretty_name": "4D occupancy, built by OccGen Hub",
        "task_categories": ["robotics"],
        "tags": ["LeRobot", *TAGS] if lerobot else TAGS,
        "size_categories": [SIZES[size]],
        "configs": configs,
    }
    return f"---\n{yaml.safe_dump(matter, sort_keys=False, width=100)}---\n\n{MARK}\n"


def _configs(facts: Facts, schema: Schema) -> list[dict[str, Any]]:
    """The configs of `load_dataset`: names, files, and columns that not all files have."""
    if facts.packed:
        shards = _config(FOLDER, f"{FOLDER}/*/*.parquet") | {"default": True}
        states = _config(STATES, f"{STATES}/*/*.parquet")
        return _without_labels(facts, [shards, states, _config(INDEX, f"{INDEX}/*.parquet")])
    frames = re.sub(r"\{[^}]*\}", "*", schema.files["frames"].path)
    configs = [_config("default", f"**/{frames}")]
    if facts.partial:  # `datasets` requires one schema for all files.
        configs[0]["columns"] = list(facts.features)
    if facts.occupancy:
        configs.append(_config(FOLDER, f"{FOLDER}/*/*.parquet"))
        configs.append(_config(STATES, f"{STATES}/*/*.parquet"))
    configs.append(_config(INDEX, f"{INDEX}/*.parquet"))
    return _without_labels(facts, configs)


def _without_labels(facts: Facts, configs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The configs of tables without the column of labels, if only some of their files have it."""
    if sum(facts.taxonomies.values()) in (0, facts.trajectories):
        return configs
    columns = {
        FOLDER: column_names(images=facts.packed, labels=False),
        STATES: list(STATE_COLUMNS),
        INDEX: [name for name in INDEX_SCHEMA.names if name != OPTIONAL],
    }
    for config in configs:
        if config["config_name"] in columns:
            config["columns"] = columns[config["config_name"]]
    return configs


def _config(name: str, path: str) -> dict[str, Any]:
    return {"config_name": name, "data_files": [{"split": "train", "path": path}]}


def _introduction(facts: Facts, *, picture: bool, layout: str = _TRAJECTORIES) -> Iterator[str]:
    yield "# 4D occupancy\n"
    yield (
        f"{_plural(facts.frames, 'frame')} of {_plural(facts.trajectories, 'trajectory')} in "
        f"{_plural(len(facts.scenes), 'scene')}. For every frame: {layout}\n"
    )
    if picture:
        yield f"![A frame: image, depth, visible occupied cells, scene from above]({PICTURE})\n"


def _splits(facts: Facts) -> Iterator[str]:
    """The split by scene."""
    counts = " and ".join(
        f"{_plural(facts.splits.get(name, 0), 'trajectory')} in `{name}`"
        for name in ("train", "validation")
    )
    yield (
        f"The index, `{INDEX}/*.parquet`, has a row for each trajectory: its frames, grid, field "
        "of view, quality, checksums, and the files and row groups of its occupancy. Its column "
        f"`split` depends only on the name of the scene: {counts}.\n"
    )


def _packed_examples(facts: Facts) -> Iterator[str]:
    """The examples for a dataset that has only shards."""
    yield "## Load it\n"
    yield "`DATASET` stands for this dataset's name on the Hub, or for its folder.\n"
    yield from _occupancy_examples()
    yield from _split_example(facts, "rows")


def _examples(facts: Facts, schema: Schema) -> Iterator[str]:
    """Examples that load each kind of data. The tests run them."""
    yield "## Load it\n"
    yield "`DATASET` stands for this dataset's name on the Hub, or for its folder.\n"
    yield "The frames of all trajectories: poses, intrinsics, time, episode and scene.\n"
    yield _python(f"""\
from datasets import load_dataset

frames = load_dataset("DATASET", split="train").with_format("numpy")
world_from_camera = frames[0]["{schema.poses}"]  # (4, 4), OpenCV axes, metres
K = frames[0]["{schema.intrinsics}"]  # (3, 3), pixels
""")
    yield from _split_example(facts, "frames")
    first = facts.first
    if facts.occupancy:
        yield from _occupancy_examples()
    yield (
        "LeRobot: `occgen-hub export DATASET lerobot` writes one LeRobot v3.0 dataset with tasks, "
        "occupancy and, if all trajectories have them, images and depth. LeRobot up to 0.3 can "
        "read a trajectory directly: "
        f"`LeRobotDataset(NAME, root={dump_json(f'DATASET/{printable(first)}')}, episodes=[0])`.\n"
    )
    yield "The files of one trajectory, from the dataset's folder:\n"
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
    yield "Occupancy frame by frame, streamed, with only `datasets` installed:\n"
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
        "Read a stream to its end: a script that stops early may hang because of a bug in "
        "pyarrow (apache/arrow#45214). For single frames, omit `streaming=True`.\n"
    )
    yield "Tensors for training, with the history of each frame (needs OccGen Hub):\n"
    yield _python("""\
from occgen_hub import OccupancyDataset

dataset = OccupancyDataset("DATASET", keys=("occupancy", "mask", "pose", "history"))
item = dataset[0]
""")


def _split_example(facts: Facts, name: str) -> Iterator[str]:
    """How to leave out the validation scenes, if there are any. name: of the variable to filter."""
    if facts.splits.keys() >= {"train", "validation"}:
        yield (
            f"`{name}` has all scenes, because the split `train` of `load_dataset` has all files. "
            '`OccupancyDataset("DATASET", split="train")` leaves out the validation scenes. The '
            "same with the column `split` of the index:\n"
        )
        yield _python(f"""\
index = load_dataset("DATASET", "index", split="train")
training = {{row["scene"] for row in index if row["split"] == "train"}}
{name} = {name}.filter(lambda scene: scene in training, input_columns="scene")
""")


def _export_examples(
    facts: Facts, schema: Schema, features: dict[str, dict[str, Any]]
) -> Iterator[str]:
    yield "## Load it\n"
    yield "`DATASET` stands for this dataset's name on the Hub.\n"
    rgb, depth = schema.folder("rgb") in features, schema.folder("depth") in features
    listed = ", ".join(["images"] * rgb + ["depth"] * depth + ["tasks", "poses", "intrinsics"])
    yield f"With LeRobot ({listed}):\n"
    unit = ', depth_output_unit="m"' * depth
    shown = f"""\
depth = frames[0]["{schema.folder("depth")}"]  # (1, H, W), metres; by default millimetres
"""
    yield _python(f"""\
from lerobot.datasets.lerobot_dataset import LeRobotDataset

frames = LeRobotDataset("DATASET"{unit})
world_from_camera = frames[0]["{schema.poses}"].view(4, 4)  # OpenCV axes, metres
{shown * depth}""")
    yield "With the occupancy in its items (needs OccGen Hub):\n"
    yield _python(f"""\
from occgen_hub import LeRobotOccupancyDataset

frames = LeRobotOccupancyDataset("DATASET")
occupied = frames[0]["{schema.folder("visible")}"]  # (nx, ny, nz) bool
observed = frames[0]["{schema.folder("observed")}"]  # (nx, ny, nz) bool
""")
    yield from _occupancy_examples()
    yield from _split_example(facts, "rows")


def _columns(features: dict[str, Feature]) -> Iterator[str]:
    yield "## Contents\n"
    yield "The columns of the frames:\n"
    yield "| column | type | shape |\n| --- | --- | --- |"
    for name, feature in features.items():
        yield f"| {_code(name)} | {feature.dtype} | {_dims(feature.shape)} |"
    yield ""


def _code(name: str) -> str:
    """A column's name as code in a Markdown table, with any special characters escaped."""
    text = one_line(name).replace("|", "\\|")
    ticks = "`" * (1 + max(map(len, re.findall("`+", text)), default=0))
    space = " " * ("`" in text)
    return f"{ticks}{space}{text}{space}{ticks}"


def _partial(facts: Facts) -> Iterator[str]:
    if facts.partial:
        yield (
            "These columns differ between trajectories and are only in their own files: "
            f"{', '.join(map(_code, sorted(facts.partial)))}.\n"
        )
    yield "`task_index` refers to `meta/tasks.jsonl` of the row's own trajectory.\n"


def _media(facts: Facts, schema: Schema) -> Iterator[str]:
    """Where images and depth are, and their unit."""
    unit = f"{schema.depth_units_per_metre:,} units per metre along the optical axis, 0 for none"
    columns = (
        "`image` (JPEG), `depth` (16-bit PNG) and `task` (the instruction); "
        f'`np.asarray(row["depth"]) / {schema.depth_units_per_metre}` is in metres'
    )
    if facts.packed:
        yield f"Each row also has {columns}. Depth has {unit}.\n"
        return
    rgb, depth = (
        schema.files[key].path.format(chunk=schema.chunk, frame="N") for key in ("rgb", "depth")
    )
    yield (
        f"The image of frame N is `{rgb}` in the folder of its trajectory, its depth `{depth}`: 16 "
        f"bits, {unit}. A dataset built with `--media none` has neither.\n"
    )
    if facts.occupancy:
        yield (
            f"A dataset built with `--parquet-images` has more columns in `{FOLDER}`: {columns}.\n"
        )


def _grids(facts: Facts) -> Iterator[str]:
    for shape, voxel_size, pc_range in sorted(facts.grids):
        yield (
            f"The grid: {_dims(shape)} cells of {voxel_size} m, in the camera's frame (x right, y "
            f"down, z forward), from {pc_range[:3]} to {pc_range[3:]} m. Cell (i, j, k) "
            "is the half-open box that starts at `pc_range[:3] + voxel_size * (i, j, k)`.\n"
        )
    yield (
        "A cell is occupied if a point of the scene's cloud lies in it; it is observed if the ray "
        "of a pixel's centre crosses it before or at the ray's first occupied cell. A sensor may "
        "miss surfaces: with `unmeasured` = unknown, a ray that meets no occupied cell is left "
        "out, unless its pixel has depth beyond the grid. Occupied cells that the camera does not "
        "see are not in a frame's occupancy.\n"
    )


def _classes(facts: Facts) -> Iterator[str]:
    """The classes of the labels."""
    for name, count in sorted(facts.taxonomies.items()):
        classes = load_taxonomy(name).classes.values()
        listed = ", ".join(f"{one.id} {one.name.replace('_', ' ')}" for one in classes)
        yield (
            f"Occupied cells of {_plural(count, 'trajectory')} have classes of the taxonomy "
            f"`{name}`: `labels`, one for each occupied cell. {UNLABELLED} means that no frame "
            f"gives a class. The classes: {listed}.\n"
        )


def _quality(facts: Facts) -> Iterator[str]:
    """How well the frames agree, and what moves."""
    if facts.moving:
        yield (
            f"Something moves in {_plural(facts.moving, 'trajectory')}: `dynamic` has the occupied "
            "cells with moving objects.\n"
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


IN_INDEX = "The index records how, with the fingerprint of each trajectory's source"
RECORDS = "Each trajectory's `meta/occgen.json` records how,"
EXPORT_RECORD = f"`{RECORD}` records the trajectory of each episode,"


def _origin(facts: Facts, records: str) -> Iterator[str]:
    """How it was built, and its licences."""
    values = {key: ", ".join(_unquoted(v) for v in sorted(facts.records.get(key, ()))) for key in
            ("source", "engine", "version")}  # fmt: skip
    yield "## How it was built\n"
    yield (
        f"By OccGen Hub {values['version']}, from the source "
        f"{values['source']}, with the engine {values['engine']}. {records} "
        "and a SHA-256 of every file; `occgen-hub validate` checks them all.\n"
    )
    configs = sorted(facts.records.get("config", ()))
    if len(configs) == 1:
        yield f"```json\n{configs[0]}\n```\n"
    yield "## Licence\n"
    known = sorted(licence for licence in facts.source_licences if licence)
    if known:
        yield f"The recordings are under the licence {', '.join(known)}."
    if None in facts.source_licences:
        yield (
            f"{'Other parts' if known else 'The recordings'} keep the licence of their source; "
            "please look it up where the recordings come from."
        )
    yield from _about(facts)
    from occgen_hub.engines.weights import COMMERCIAL  # Engines are slow to import.

    yield "OccGen Hub itself adds no conditions."
    for network, licence in sorted(facts.licences):
        phrase = f"{network} with weights under the licence {licence}"
        if licence in COMMERCIAL:
            yield f"\nThe occupancy was reconstructed by {phrase}, which allows commercial use."
            continue
        forbids = ", which forbids commercial use" if "-nc" in licence.lower() else ""
        yield (
            f"\nThe occupancy was reconstructed by {phrase}{forbids}. The same applies to this "
            "dataset."
        )
    yield "\n## Citation\n"
    yield "Please cite the source of the recordings, and OccGen Hub:\n"
    plain = values["version"].replace("`", "")
    yield f"""\
```bibtex
@software{{occgen_hub,
  title   = {{OccGen Hub: 4D occupancy datasets from robot recordings}},
  version = {{{plain}}},
  year    = {{2026}},
  license = {{Apache-2.0}}
}}
```"""


def _about(facts: Facts) -> Iterator[str]:
    """What the sources say about their recordings. Sources that are not installed are skipped."""
    for name in sorted(json.loads(value) for value in facts.records.get("source", ())):
        with suppress(UsageError):
            if about := getattr(load_plugin("source", name)[0], "about", ""):
                yield str(about)


def _python(code: str) -> str:
    return f"```python\n{code}```\n"


def _dims(shape: tuple[int, ...]) -> str:
    return " x ".join(map(str, shape))


def _plural(number: int, what: str) -> str:
    many = what.removesuffix("y") + "ies" if what.endswith("y") else f"{what}s"
    return f"{number:,} {what if number == 1 else many}"


def _unquoted(value: str) -> str:
    """A string of a record, from its JSON."""
    return f"`{value.strip(chr(34))}`"
