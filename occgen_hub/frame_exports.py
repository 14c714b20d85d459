"""Write a built dataset as one file per frame, in the formats of OccScanNet and Occ3D.

Both hold the scene's cells around a camera, including hidden ones, in upright grids.
"""

from __future__ import annotations

import hashlib
import pickle
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from occgen_hub.errors import UsageError
from occgen_hub.files import dump_json, printable, read_bytes
from occgen_hub.geometry.poses import stands_upright, upright_pose
from occgen_hub.index import file_stem, split
from occgen_hub.loading import Trajectory
from occgen_hub.media import encode_jpeg, write_depth
from occgen_hub.occupancy.grid import Grid
from occgen_hub.occupancy.states import FREE, OCCUPIED, UNKNOWN, SceneStates
from occgen_hub.prefetch import prefetch
from occgen_hub.taxonomy import load_taxonomy

CELL = 0.08
"""Metres: edge of a cell in both formats."""

MOST_PARTS = 8
"""A cell is sampled in at most this many parts along an edge."""

MILLIMETRES = 1000
"""Units per metre of a depth image."""

MINI = 10
"""OccScanNet's mini lists have one frame out of this many."""

Progress = Callable[[int], None]


class FrameExport(ABC):
    """Writes the frames of trajectories: call `add` for each trajectory, then `finish`.

    Frames without occupied cells are left out, because losses divide by the cells of a class.
    """

    name: ClassVar[str]
    card: ClassVar[str]
    """The card's description of the files, in Markdown."""
    ONE_CLASS: ClassVar[int]
    """The class of all occupied cells if the dataset has no classes."""
    UNLABELLED: ClassVar[int]
    """The class of occupied cells without a class if the dataset has classes."""
    FREE_CLASS: ClassVar[int]
    UNKNOWN_CLASS: ClassVar[int]

    def __init__(self, folder: Path) -> None:
        """folder: an existing folder for the export."""
        self.folder = folder
        self.empty = self.without_depth = self.tilted = 0
        self.taxonomies: Counter[str | None] = Counter()
        self.splits: Counter[str] = Counter()

    def add(self, episode: str, trajectory: Trajectory, progress: Progress) -> None:
        """Write the frames of a trajectory. Raises UsageError if it has no images."""
        states = trajectory.states()
        surface = (states.cells(OCCUPIED).astype(np.float64) + 0.5) * states.voxel_size
        picture, depth = _pictures(trajectory), trajectory.file("depth", 0).parent.is_dir()
        self.without_depth += not depth
        self.tilted += not stands_upright(trajectory.world_from_camera())
        self.taxonomies[trajectory.taxonomy] += 1
        frames = self._frames(episode, trajectory)
        for frame, arrays in prefetch(lambda f: (f, self._arrays(f, states, surface)), frames):
            progress(1)
            image = picture(frame.number)
            if arrays is None:
                self.empty += 1
                continue
            self.splits[split(episode.rpartition("/")[0])] += 1
            self._write(frame, arrays, image)
            if depth:
                metres = trajectory.depth(frame.number)
                assert metres is not None
                self._write_depth(frame, metres)

    def finish(self) -> list[str]:
        """Write the files that belong to all frames. Returns remarks for the user."""
        self._finish()
        remarks = []
        if plain := self.taxonomies.pop(None, 0):
            of = f"{plain} trajectories have" if self.taxonomies else "the dataset has"
            remarks.append(f"all occupied cells have one class, since {of} no classes")
        if names := sorted(filter(None, self.taxonomies)):
            remarks.append(
                f"classes of the taxonomy {', '.join(names)} became those of OccScanNet, 1 to 11, "
                f"as OccGen Hub assigns them; occupied cells without a class are {self.UNLABELLED}"
            )
        for name in ("train", "validation"):
            if not self.splits[name]:
                remarks.append(
                    f"no scene is in the split {name}, which depends on the scenes' names, so its "
                    "lists are empty"
                )
        if self.empty:
            remarks.append(f"{self.empty} frames without an occupied cell are left out")
        if self.tilted:
            remarks.append(
                f"the cameras of {self.tilted} trajectories are not upright: unless they look "
                "straight down, their world's z axis does not point up and the grids are wrong"
            )
        if self.without_depth:
            remarks.append(f"{self.without_depth} trajectories have no depth images")
        return remarks

    def _frames(self, episode: str, trajectory: Trajectory) -> Iterator[Frame]:
        poses, K = trajectory.world_from_camera(), trajectory.intrinsics()
        rows = zip(poses, K, trajectory.observed_packed(), strict=True)
        classes: NDArray[np.uint8] = np.full(256, self.ONE_CLASS, np.uint8)
        if trajectory.taxonomy is not None:
            classes = load_taxonomy(trajectory.taxonomy).to_occscannet(self.UNLABELLED)
        classes[[FREE, UNKNOWN]] = self.FREE_CLASS, self.UNKNOWN_CLASS
        for t, row in enumerate(rows):
            yield Frame(episode, t, trajectory.grid, *row, classes)

    @abstractmethod
    def _arrays(
        self, frame: Frame, states: SceneStates, surface: NDArray[np.float64]
    ) -> dict[str, Any] | None:
        """The arrays of a frame, or None if no cell is occupied. Called in threads.

        surface: (n, 3) the centres of the scene's occupied cells, world metres.
        """

    @abstractmethod
    def _write(self, frame: Frame, arrays: dict[str, Any], image: bytes) -> None: ...

    @abstractmethod
    def _write_depth(self, frame: Frame, metres: NDArray[np.float64]) -> None: ...

    @abstractmethod
    def _finish(self) -> None: ...


@dataclass(frozen=True)
class Frame:
    """A frame of an episode.

    grid: of its camera; pose: (4, 4) world_from_camera, OpenCV axes, metres; intrinsics: (3, 3),
    pixels; observed: packed mask of the grid's observed cells; classes: (256,) uint8, the export's
    class of each label.
    """

    episode: str
    number: int
    grid: Grid
    pose: NDArray[np.float64]
    intrinsics: NDArray[np.float64]
    observed: NDArray[np.uint8]
    classes: NDArray[np.uint8]


class OccScanNet(FrameExport):
    """Pickles and images as the loaders of OccScanNet, EmbodiedOcc and ISO read them."""

    name = "occscannet"
    card = """\
`{train,test}_final.txt` list the frames, `{train,test}_mini_final.txt` a tenth of them, and
`{train,val}_subscenes.txt` all frames under ISO's names. Each line names a pickle of a dict:

| key | |
| --- | --- |
| `target_1_4` | uint8 (60, 60, 36), stored [y, x, z]: 0 free, 1 to 11 classes of OccScanNet, 255 unknown |
| `target_1_16` | uint8 (15, 15, 9), in the same order: of 64 cells, the most common class if more than a twentieth have one, else free or unknown |
| `voxel_origin` | float64 (3,), world metres: the lower corner of the grid of 4.8 x 4.8 x 2.88 m in cells of 8 cm, aligned to the world's axes, z up, in front of the camera |
| `cam_pose`, `intrinsic` | float64 (4, 4): camera to world, OpenCV axes; for the stored image |
| `img`, `depth_gt` | paths of the JPEG and of the depth, 16-bit PNG, millimetres |
"""  # noqa: E501
    SHAPE: ClassVar[tuple[int, int, int]] = (60, 60, 36)
    ONE_CLASS, UNLABELLED = 11, 255  # objects; ignored, like unknown cells
    FREE_CLASS, UNKNOWN_CLASS = 0, 255

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self._lines: dict[str, list[str]] = {"train": [], "validation": []}

    def _arrays(
        self, frame: Frame, states: SceneStates, surface: NDArray[np.float64]
    ) -> dict[str, Any] | None:
        origin = self._origin(frame.pose, surface)
        pose = np.eye(4)
        pose[:3, 3] = origin
        labels = _sampled(states, (0.0, 0.0, 0.0), self.SHAPE, pose)
        target = frame.classes[labels]
        if not ((target != FREE) & (target != UNKNOWN)).any():
            return None
        intrinsic = np.eye(4)
        intrinsic[:3, :3] = frame.intrinsics
        stored = np.ascontiguousarray(target.transpose(1, 0, 2))
        return {
            "cam_pose": frame.pose.copy(),
            "intrinsic": intrinsic,
            "voxel_origin": origin,
            "target_1_4": stored,
            "target_1_16": joined_labels(stored, 4),
        }

    def _origin(
        self, pose: NDArray[np.float64], surface: NDArray[np.float64]
    ) -> NDArray[np.float64]:
        """(3,) metres, multiples of CELL: the grid starts at the camera and at the floor."""
        sides = CELL * np.array(self.SHAPE)
        camera, ahead = pose[:3, 3], upright_pose(pose)[:3, 2]
        low = camera - sides / 2
        low[:2] += ahead[:2] * sides[0] / 2
        inside = (surface[:, :2] >= low[:2]) & (surface[:, :2] < low[:2] + sides[:2])
        heights = surface[inside.all(axis=1), 2]
        below = heights[(heights < camera[2]) & (heights > camera[2] - sides[2] + CELL)]
        if len(below):  # The 1st percentile ignores outliers.
            low[2] = np.partition(below, len(below) // 100)[len(below) // 100] - CELL
        origin: NDArray[np.float64] = np.floor(low / CELL + 1e-6) * CELL
        return origin

    def _write(self, frame: Frame, arrays: dict[str, Any], image: bytes) -> None:
        scene, number = file_stem(frame.episode), f"{frame.number:05d}"
        picture = f"posed_images/{scene}/{number}"
        line = f"gathered_data/{scene}/{number}.pkl"
        content = {"img": f"{picture}.jpg", "depth_gt": f"{picture}.png", **arrays}
        for name, data in ((line, portable_pickle(content)), (f"{picture}.jpg", image)):
            path = self.folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data)
        self._lines[split(frame.episode.rpartition("/")[0])].append(line)

    def _write_depth(self, frame: Frame, metres: NDArray[np.float64]) -> None:
        place = f"posed_images/{file_stem(frame.episode)}/{frame.number:05d}.png"
        write_depth(self.folder / place, metres, MILLIMETRES)

    def _finish(self) -> None:
        for name, lines in (("train", self._lines["train"]), ("test", self._lines["validation"])):
            other = {"train": "train", "test": "val"}[name]
            for file, chosen in (
                (f"{name}_final.txt", lines),
                (f"{name}_mini_final.txt", lines[::MINI]),
                (f"{other}_subscenes.txt", lines),
            ):
                (self.folder / file).write_text("".join(f"{line}\n" for line in chosen))


class Occ3D(FrameExport):
    """`labels.npz` for each frame in the ego frame, as in Occ3D-nuScenes."""

    name = "occ3d"
    card = """\
`gts/scene-NNNN/<token>/labels.npz` of each frame has `semantics`, `mask_lidar` and `mask_camera`,
uint8 [x, y, z], cells of 8 cm in the ego frame: x ahead, y left, z up, origin at the camera.
`semantics` is 0 to 16 for occupied and 17 for free cells. `mask_lidar` is 1 if the state is known
from some frame of the episode, and `mask_camera` is 1 if this frame observed the cell too. If
`mask_lidar` is 0, the state is unknown and `semantics` is 17. `annotations.json` has the grid, the
split by scene and, for each token, the image, intrinsics and poses (quaternions w, x, y, z).
"""
    ONE_CLASS = UNLABELLED = 0  # others
    FREE_CLASS = UNKNOWN_CLASS = 17

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self._infos: dict[str, dict[str, Any]] = {}
        self._splits: dict[str, list[str]] = {"train": [], "validation": []}
        self._numbers: dict[str, int] = {}
        self._grid: dict[str, Any] = {}

    def _arrays(
        self, frame: Frame, states: SceneStates, surface: NDArray[np.float64]
    ) -> dict[str, Any] | None:
        lower, shape = ego_grid(frame.grid)
        pose = ego_pose(frame.pose)
        labels = _sampled(states, lower, shape, pose)
        known = labels != UNKNOWN
        if not (known & (labels != FREE)).any():
            return None
        seen = _observed(frame, lower, shape, pose)
        self._grid = {"lower": list(lower), "shape": list(shape), "voxel_size": CELL}
        return {
            "semantics": frame.classes[labels],
            "mask_lidar": known.astype(np.uint8),
            "mask_camera": (known & seen).astype(np.uint8),
        }

    def _write(self, frame: Frame, arrays: dict[str, Any], image: bytes) -> None:
        number = self._numbers.setdefault(frame.episode, len(self._numbers))
        scene, token = f"scene-{number:04d}", _token(frame)
        if scene not in self._infos:
            self._infos[scene] = {}
            self._splits[split(frame.episode.rpartition("/")[0])].append(scene)
        labels, picture = f"gts/{scene}/{token}/labels.npz", f"imgs/CAM_FRONT/{token}.jpg"
        for name in (labels, picture):
            (self.folder / name).parent.mkdir(parents=True, exist_ok=True)
        np.savez_compressed(self.folder / labels, **arrays)
        (self.folder / picture).write_bytes(image)
        world_from_ego = ego_pose(frame.pose)
        self._infos[scene][token] = {
            "episode": printable(frame.episode),
            "frame_index": frame.number,
            "gt_path": labels,
            "camera_sensor": {
                "CAM_FRONT": {
                    "img_path": picture,
                    "intrinsics": frame.intrinsics.tolist(),
                    "extrinsic": _transform(np.linalg.inv(world_from_ego) @ frame.pose),
                }
            },
            "ego_pose": _transform(world_from_ego),
        }

    def _write_depth(self, frame: Frame, metres: NDArray[np.float64]) -> None:
        """Occ3D has no depth."""

    def _finish(self) -> None:
        for tokens in self._infos.values():
            names = [None, *tokens, None]
            for before, token, after in zip(names, names[1:], names[2:], strict=False):
                tokens[str(token)] |= {"prev": before, "next": after}
        content = {
            "grid": self._grid,
            **({"classes": self._classes()} if any(self.taxonomies) else {}),
            "train_split": self._splits["train"],
            "val_split": self._splits["validation"],
            "scene_infos": self._infos,
        }
        (self.folder / "annotations.json").write_text(dump_json(content), encoding="utf-8")

    def _classes(self) -> dict[int, str]:
        """The names of the classes in `semantics`."""
        named = load_taxonomy("occscannet11").classes.values()
        return {0: "others", **{one.id: one.name for one in named}, self.FREE_CLASS: "free"}


EXPORTS: dict[str, type[FrameExport]] = {form.name: form for form in (OccScanNet, Occ3D)}


def write_frames(
    folder: Path, form: str, names: Iterable[tuple[str, Path]], progress: Progress
) -> list[str]:
    """Write trajectories, given as ids and folders, into an empty folder. form: a key of EXPORTS.

    Returns remarks for the user. Raises UsageError for a trajectory without images, DatasetError
    for a damaged one.
    """
    export = EXPORTS[form](folder)
    for name, path in names:
        export.add(printable(name), Trajectory.open(path), progress)
    return export.finish()


def ego_pose(pose: NDArray[np.float64]) -> NDArray[np.float64]:
    """(4, 4) world_from_ego of a camera: x ahead, y left, z up, the origin at the camera."""
    upright = upright_pose(pose)
    ego = upright.copy()
    ego[:3, :3] = np.stack([upright[:3, 2], -upright[:3, 0], -upright[:3, 1]], axis=1)
    return ego


def ego_grid(grid: Grid) -> tuple[tuple[float, float, float], tuple[int, int, int]]:
    """The lower corner (metres) and shape (cells) of a grid in ego axes that covers a camera's."""
    low = np.asarray(grid.lower)
    high = low + grid.voxel_size * np.asarray(grid.shape)
    lower = np.array([low[2], -high[0], -high[1]])
    sides = np.array([high[2] - low[2], high[0] - low[0], high[1] - low[1]])
    nx, ny, nz = np.ceil(sides / CELL - 1e-6).astype(int).tolist()
    x, y, z = lower.round(9).tolist()
    return (x, y, z), (nx, ny, nz)


def joined_labels(target: NDArray[np.uint8], factor: int) -> NDArray[np.uint8]:
    """Labels of cells that are `factor` times as wide, by the rule of the NYU v2 benchmark.

    If at least 95 % of the cells are free or unknown: the more common of the two. Else the most
    common class.
    """
    shape = np.array(target.shape) // factor
    parts = target.reshape(shape[0], factor, shape[1], factor, shape[2], factor)
    parts = parts.transpose(0, 2, 4, 1, 3, 5).reshape(-1, factor**3)
    counts = np.stack([(parts == label).sum(axis=1) for label in range(int(UNKNOWN))], axis=1)
    free, unknown = counts[:, 0].copy(), (parts == UNKNOWN).sum(axis=1)
    counts[:, 0] = 0
    most_common = counts.argmax(axis=1).astype(np.uint8)
    nothing = np.where(free > unknown, FREE, UNKNOWN)
    joined = np.where(free + unknown > 0.95 * factor**3, nothing, most_common)
    return joined.reshape(shape).astype(np.uint8)


def portable_pickle(content: dict[str, Any]) -> bytes:
    """A pickle that numpy 1 and 2 can load: it uses the module name that both know."""
    data = pickle.dumps(content, protocol=3)
    own, old = (f"cnumpy.{core}.multiarray\n_reconstruct\n".encode() for core in ("_core", "core"))
    return data.replace(own, old)


def _sampled(
    states: SceneStates,
    lower: tuple[float, float, float],
    shape: tuple[int, int, int],
    pose: NDArray[np.float64],
) -> NDArray[np.uint8]:
    """The labels of cells of CELL metres, sampled in parts no wider than the scene's cells."""
    parts = 1
    while parts < MOST_PARTS and CELL / parts > 1.01 * states.voxel_size:
        parts *= 2
    nx, ny, nz = (n * parts for n in shape)
    return states.cut(Grid(lower, CELL / parts, (nx, ny, nz)), pose, parts)


def _observed(
    frame: Frame,
    lower: tuple[float, float, float],
    shape: tuple[int, int, int],
    pose: NDArray[np.float64],
) -> NDArray[np.bool_]:
    """Which cells of CELL metres a frame observed, from its camera's grid at that cell size."""
    grid = frame.grid
    bits: NDArray[Any] = np.unpackbits(frame.observed, count=grid.cells).reshape(grid.shape)
    step = max(1, round(CELL / grid.voxel_size))
    for axis in range(3):
        bits = np.maximum.reduceat(bits, np.arange(0, bits.shape[axis], step), axis=axis)
    cells = np.indices(shape).reshape(3, -1).T
    motion = np.linalg.inv(frame.pose) @ pose
    centres = (np.asarray(lower) + (cells + 0.5) * CELL) @ motion[:3, :3].T + motion[:3, 3]
    place = np.floor((centres - np.asarray(grid.lower)) / (step * grid.voxel_size)).astype(int)
    seen: NDArray[np.bool_] = ((place >= 0) & (place < bits.shape)).all(axis=1)
    seen[seen] = bits[tuple(place[seen].T)]
    return seen.reshape(shape)


def _pictures(trajectory: Trajectory) -> Callable[[int], bytes]:
    """A function that returns the JPEG of a frame. Call it with frames in order."""
    images, stored = trajectory.images(), trajectory.file("rgb", 0).parent.is_dir()

    def read(frame: int) -> bytes:
        if stored:
            return read_bytes(trajectory.file("rgb", frame))
        pixels = images(frame)
        if pixels is None:
            raise UsageError(
                f"{trajectory.path}: has no images; build the dataset with --media copy from a "
                "source that has them."
            )
        return encode_jpeg(pixels)

    return read


def _token(frame: Frame) -> str:
    return hashlib.sha256(f"{frame.episode}/{frame.number}".encode()).hexdigest()[:32]


def _transform(pose: NDArray[np.float64]) -> dict[str, list[float]]:
    """A pose as in nuScenes: a translation in metres and a quaternion w, x, y, z."""
    from scipy.spatial.transform import Rotation

    x, y, z, w = Rotation.from_matrix(pose[:3, :3]).as_quat().tolist()
    return {"translation": pose[:3, 3].tolist(), "rotation": [w, x, y, z]}
