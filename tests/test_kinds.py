"""If a source cannot read an input, the error names the source that can."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from occgen_hub.builder import load_builder
from occgen_hub.errors import OccGenError, UsageError
from occgen_hub.job import list_episodes
from occgen_hub.media import write_video

SOURCES = ("internnav", "video", "capture")


def refusal(source: str, root: Path) -> str:
    """The error message of a source for a folder."""
    with pytest.raises(UsageError) as error:
        list_episodes(load_builder(source, root))
    return str(error.value)


def write_grey_image(path: Path, bits: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    kind = np.uint16 if bits == 16 else np.uint8
    Image.fromarray(np.full((32, 48), 200, kind)).save(path)


@pytest.fixture(params=["v2.1", "v3.0"])
def lerobot(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """The folders and files of a LeRobot dataset with one camera, without valid tables."""
    new = request.param == "v3.0"
    place = tmp_path / "robots/pick_and_place"
    data = "data/chunk-000/file-000.parquet" if new else "data/chunk-000/episode_000000.parquet"
    camera = "videos/observation.images.top/chunk-000/file-000.mp4"
    older = "videos/chunk-000/observation.images.top/episode_000000.mp4"
    for name in (data, camera if new else older, "meta/info.json"):
        (place / name).parent.mkdir(parents=True)
    (place / data).write_bytes(b"PAR1")
    frames = [np.full((32, 48, 3), n, np.uint8) for n in range(3)]
    write_video(place / (camera if new else older), frames, 10.0)
    features = {"action": {"dtype": "float32", "shape": [26], "names": None}}
    info = {"codebase_version": request.param, "fps": 10, "features": features}
    (place / "meta/info.json").write_text(json.dumps(info))
    return place


@pytest.mark.parametrize("source", SOURCES)
def test_other_sources_refer_lerobot_datasets_to_source_lerobot(source: str, lerobot: Path) -> None:
    message = refusal(source, lerobot)
    version = json.loads((lerobot / "meta/info.json").read_text())["codebase_version"]
    assert f"a LeRobot {version} dataset" in message
    assert "use --source lerobot" in message
    if source != "capture":  # Also for the parent folder.
        assert "pick_and_place: is a LeRobot" in refusal(source, lerobot.parent)


def test_source_video_accepts_the_videos_folder_of_a_lerobot_dataset(lerobot: Path) -> None:
    assert len(list_episodes(load_builder("video", lerobot / "videos"))) == 1


@pytest.mark.parametrize("source", SOURCES)
def test_built_dataset_is_refused_as_source(source: str, dataset: Path) -> None:
    assert "is a dataset that occgen-hub built" in refusal(source, dataset)


@pytest.mark.parametrize("source", ["internnav", "video"])
def test_part_of_a_built_dataset_is_refused_as_source(source: str, dataset: Path) -> None:
    assert "is a dataset that occgen-hub built" in refusal(source, next(dataset.glob("sample*")))


def test_source_video_refers_depth_folders_to_source_capture(tmp_path: Path) -> None:
    write_grey_image(tmp_path / "depth/0.png", 16)
    message = refusal("video", tmp_path / "depth")
    assert (
        "16-bit grey ones are depth, which --source capture reads together with colour" in message
    )


def test_source_video_refers_depth_among_images_to_source_capture(tmp_path: Path) -> None:
    write_grey_image(tmp_path / "0.png", 8)
    write_grey_image(tmp_path / "1.png", 16)
    builder = load_builder("video", tmp_path)
    (ref,) = list_episodes(builder)
    with pytest.raises(OccGenError, match=r"is a 16-bit grey image.* use --source capture"):
        builder.read(ref)


def test_source_internnav_refers_captures_to_source_capture(tmp_path: Path) -> None:
    for name in ("rgb.txt", "depth.txt", "groundtruth.txt"):
        (tmp_path / name).write_text("# empty\n")
    message = refusal("internnav", tmp_path)
    assert "it is a TUM RGB-D recording: use --source capture" in message


def test_source_capture_refers_other_inputs_to_their_source(
    sample_tree: Path, tmp_path: Path
) -> None:
    message = refusal("capture", sample_tree)
    assert "it is a tree of InternData-N1: use --source internnav" in message
    write_grey_image(tmp_path / "walk/0.jpg", 8)
    assert "it is a folder of videos or images: use --source video" in refusal("capture", tmp_path)
