"""The tables and the metadata of episodes: parquet, info, episodes, statistics and tasks."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from occgen_hub.sample.episode import Episode
from occgen_hub.sample.images import VIDEO_FPS

MATRICES = {"observation.camera_intrinsic": 3, "observation.camera_extrinsic": 4, "action": 4}
BOOKKEEPING = ("timestamp", "frame_index", "episode_index", "index", "task_index")
WRONG_FPS = 30  # what the real release declares, at ten
Columns = Mapping[str, NDArray[Any]]


class Recorder:
    """Writes the tables of a dataset's episodes, and its metadata at the end."""

    def __init__(self, folder: Path, faults: bool, image_ranges: bool) -> None:
        """Write into `folder`. image_ranges: whether to record the images of each episode."""
        self.folder, self.faults, self.image_ranges = folder, faults, image_ranges
        self.fps = WRONG_FPS if faults else VIDEO_FPS
        self.frames = 0
        self.tasks: list[str] = []
        self.episodes: list[dict[str, Any]] = []
        self.stats: list[dict[str, Any]] = []

    def add(self, episode: Episode) -> None:
        """Write an episode's parquet, and collect its metadata."""
        number, n = len(self.episodes), len(episode)
        columns = self._columns(episode, n)
        held = {k: v for k, v in columns.items() if not self.faults or k in ("index", *MATRICES)}
        _write_parquet(self.folder / f"data/chunk-000/episode_{number:06d}.parquet", held)
        texts = [task.json() for task in episode.tasks]
        declared = 2 * n if self.faults else n
        stats = {k: _stats(v) for k, v in self._columns(episode, declared).items()}
        record: dict[str, Any] = {"episode_index": number}
        if self.image_ranges:
            record["image_index"] = {"min": self.frames, "max": self.frames + n - 1}
        self.stats.append({**record, "stats": {k: stats[k] for k in (*MATRICES, *BOOKKEEPING)}})
        self.episodes.append({"episode_index": number, "tasks": texts, "length": declared})
        self.tasks += texts
        self.frames += n

    def close(self) -> None:
        """Write the metadata."""
        meta = self.folder / "meta"
        info = json.dumps(self._info(), indent=4, ensure_ascii=False)
        (meta / "info.json").write_text(info, encoding="utf-8")
        _write_lines(meta / "episodes.jsonl", self.episodes)
        _write_lines(meta / "episodes_stats.jsonl", self.stats)
        tasks = [{"task_index": i, "task": text} for i, text in enumerate(self.tasks)]
        _write_lines(meta / "tasks.jsonl", tasks)

    def _columns(self, episode: Episode, n: int) -> dict[str, NDArray[Any]]:
        """The columns of `n` rows. Rows after the end of the episode repeat its last pose."""
        rows = np.arange(n)
        own = np.linspace(0, len(episode) - 1, n).round().astype(np.int64)
        return {
            "index": self.frames + rows,
            "observation.camera_intrinsic": _repeated(episode.camera.K, n),
            "observation.camera_extrinsic": _repeated(episode.body_from_camera, n),
            "action": episode.world_from_camera[own].astype(np.float32),
            "timestamp": (rows / self.fps).astype(np.float32),
            "frame_index": rows,
            "episode_index": np.full(n, len(self.episodes)),
            "task_index": np.full(n, len(self.tasks)),
        }

    def _info(self) -> dict[str, Any]:
        features = {k: _matrix_feature(k, size) for k, size in MATRICES.items()}
        for key in BOOKKEEPING:
            dtype = "float32" if key == "timestamp" else "int64"
            features[key] = {"dtype": dtype, "shape": [1], "names": None}
        return {
            "codebase_version": "v2.1",
            "robot_type": "unknown",
            "total_episodes": len(self.episodes),
            "total_frames": sum(e["length"] for e in self.episodes),
            "total_tasks": len(self.tasks),
            "total_videos": 0,
            "total_chunks": 1,
            "chunks_size": 1000,
            "fps": self.fps,
            "splits": {"train": f"0:{len(self.episodes)}"},
            "data_path": "data/chunk-{episode_chunk:03d}/episode_{episode_index:06d}.parquet",
            "video_path": "videos/chunk-{episode_chunk:03d}/{video_key}/episode_{episode_index:06d}.mp4",  # noqa: E501
            "features": features,
        }


def _write_parquet(path: Path, columns: Columns) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    row = pa.list_(pa.field("element", pa.float32()))
    matrix = pa.list_(pa.field("element", row))
    arrays, fields, features = [], [], {}
    for key, values in columns.items():
        kind = matrix if key in MATRICES else pa.from_numpy_dtype(values.dtype)
        arrays.append(pa.array(values.tolist(), kind))
        fields.append(pa.field(key, kind))
        features[key] = _hub_feature(values)
    schema = pa.schema(fields, {"huggingface": json.dumps({"info": {"features": features}})})
    with pa.OSFile(os.fsencode(path), "wb") as file:  # A path may look like a URI.
        pq.write_table(pa.table(arrays, schema=schema), file)


def _hub_feature(values: NDArray[Any]) -> dict[str, Any]:
    """The description of a column of such values by Hugging Face's datasets."""
    feature: dict[str, Any] = {"dtype": str(values.dtype), "_type": "Value"}
    for _ in range(values.ndim - 1):
        feature = {"feature": feature, "_type": "Sequence"}
    return feature


def _matrix_feature(key: str, size: int) -> dict[str, Any]:
    name = key.removeprefix("observation.camera_")
    names = [f"{name}_{i}_{j}" for i in range(size) for j in range(size)]
    return {"dtype": "float32", "shape": [size, size], "names": names}


def _stats(values: NDArray[Any]) -> dict[str, Any]:
    """Minimum, maximum, mean and deviation, nested as the real release nests them."""
    rows = values.reshape(len(values), 1, *values.shape[1:])
    wide = rows.astype(np.float64)
    return {
        "min": rows.min(axis=0, keepdims=values.ndim == 1).tolist(),
        "max": rows.max(axis=0, keepdims=values.ndim == 1).tolist(),
        "mean": wide.mean(axis=0, keepdims=values.ndim == 1).tolist(),
        "std": wide.std(axis=0, keepdims=values.ndim == 1).tolist(),
        "count": [len(values)],
    }


def _repeated(matrix: NDArray[np.float64], n: int) -> NDArray[np.float32]:
    return np.repeat(matrix[None].astype(np.float32), n, axis=0)


def _write_lines(path: Path, records: Sequence[Mapping[str, Any]]) -> None:
    lines = [json.dumps(record, ensure_ascii=False) + "\n" for record in records]
    path.write_text("".join(lines), encoding="utf-8")
