"""A job: the episodes of a source, their output and settings."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from occgen_hub.builder import (
    DatasetBuilder,
    EpisodeRef,
    builder_names,
    id_problem,
    load_builder,
    other_source,
)
from occgen_hub.camera_mapping import CameraMapping
from occgen_hub.config import Config
from occgen_hub.engines import (
    AUTO,
    Auto,
    Engine,
    check_license,
    load_engine,
    network_engine,
    without_downloads,
)
from occgen_hub.episode_build import Settings, why_outdated
from occgen_hub.errors import OccGenError, UsageError, shorten_message
from occgen_hub.files import dump_json, printable, sha256
from occgen_hub.hub_source import HubSource, select_scenes
from occgen_hub.kinds import check_not_built
from occgen_hub.lerobot.writer import Media
from occgen_hub.loading import Trajectory
from occgen_hub.scenes import (
    SceneRecord,
    SceneRef,
    digest,
    list_archives,
    read_scene,
    selected,
    why_scene_outdated,
)
from occgen_hub.schema import load_schema
from occgen_hub.scratch import DEFAULT_LIMIT, ScratchPlace
from occgen_hub.segmenters import load_segmenter
from occgen_hub.up_to_date import check_replaceable

logger = logging.getLogger(__name__)

if TYPE_CHECKING:
    from occgen_hub.engines.network import NetworkEstimate

License = Literal["any", "commercial"]
"""The use that a network's weights must allow."""


def check_paths(root: Path, out: Path) -> None:
    """Raise UsageError unless `root` can be read and `out` be written."""
    if not (root.is_dir() or root.is_file()):
        problem = "is not a folder or a file" if root.exists() else "does not exist"
        raise UsageError(f"{root}: {problem}; give the input as --input.")
    try:
        source, target = root.resolve(), out.resolve()
    except (OSError, RuntimeError) as error:  # RuntimeError: a link to itself.
        raise UsageError(
            f"{out}: cannot be followed ({error}); choose another --output."
        ) from error
    if target == source or source in target.parents:
        raise UsageError(
            f"{out}: the output is inside the input {root}; choose an --output outside it."
        )
    if target in source.parents and root.is_dir():
        raise UsageError(
            f"{out}: the input {root} is inside the output, and would be read as a part of the "
            "dataset; choose an --output beside it."
        )
    if out.exists() and not out.is_dir():
        raise UsageError(f"{out}: is a file; give a folder as --output.")


def list_refs(
    builder: DatasetBuilder, limit: int | None = None, scenes: Sequence[str] = ()
) -> list[EpisodeRef | SceneRef]:
    """What to build, sorted: episodes, and archives, whose episodes are not known yet.

    limit: their maximum number; scenes: patterns of scenes to build, or none for all. Raises
    UsageError if there is nothing to build.
    """
    archives = list(list_archives(builder.root)) if builder.takes_archives else []
    if not archives:
        return [*list_episodes(builder, limit, scenes)]
    root = builder.root
    unpacked = {} if root.is_file() else {ref.id: ref for ref in _listed(builder)}
    beside = {"/".join(name.split("/")[:-1]) for name in unpacked}
    kept = [ref for ref in archives if ref.id not in beside]
    if passed := len(archives) - len(kept):
        logger.warning(
            "Warning: %s: %d archives are ignored, because their unpacked folders are beside them.",
            printable(str(root)), passed,
        )  # fmt: skip
    found: list[EpisodeRef | SceneRef] = [*unpacked.values(), *kept]
    found.sort(key=lambda ref: ref.id)
    return _checked(builder, _selected(builder.root, found, scenes)[:limit])


def _listed(builder: DatasetBuilder) -> Iterator[EpisodeRef]:
    """The builder's episodes. Raises UsageError for unexpected errors of the builder."""
    try:
        yield from builder.episodes()
    except (OccGenError, OSError, MemoryError):
        raise
    except Exception as error:  # Sources of other packages may raise anything.
        raise UsageError(
            f"{builder.root}: the source {builder.name} cannot list its episodes "
            f"({type(error).__name__}: {shorten_message(str(error))}); check that this folder is "
            "what it reads, or report this to its authors."
        ) from error


def list_episodes(
    builder: DatasetBuilder, limit: int | None = None, scenes: Sequence[str] = ()
) -> list[EpisodeRef]:
    """The episodes to build, at most `limit`.

    Raises UsageError if there are none, if ids are invalid or duplicated, and if the source is a
    built dataset.
    """
    check_not_built(builder.root, [builder.root])
    if builder.root.is_file() and not builder.takes_file:
        raise UsageError(
            f"{builder.root}: is not a folder; "
            + (
                other_source(builder.root, builder.name)
                or "give the root of the source tree as --input, or another --source than "
                f"{builder.name}: {', '.join(builder_names())}"
            )
            + "."
        )
    refs: list[EpisodeRef] = []
    others = False
    for ref in _listed(builder):
        if limit is not None and len(refs) >= limit:
            break
        path: Any = ref.path
        if not isinstance(path, Path):
            raise UsageError(
                f"source {builder.name}: the path of {ref.id} is a {type(path).__name__}; give a "
                "pathlib.Path."
            )
        if selected(ref.id, scenes):
            refs.append(ref)
        others = True
    if others and not refs:
        _selected(builder.root, refs, scenes)
    if not refs:
        raise UsageError(
            f"{builder.root}: holds no episode that the source {builder.name} can read; "
            + (
                other_source(builder.root, builder.name)
                or "give the root of the tree, above its groups and scenes, or another --source: "
                + ", ".join(builder_names())
            )
            + "."
        )
    check_not_built(builder.root, (ref.path for ref in refs))
    for ref in refs:
        if problem := id_problem(ref.id):
            raise UsageError(
                f"{ref.path}: the source {builder.name} named it {printable(ref.id)!r}, which "
                f"{problem}; the source has to give <group>/<scene>/<trajectory>."
            )
    return _checked(builder, refs)


def _selected[Ref: EpisodeRef | SceneRef](
    root: Path | HubSource, refs: list[Ref], scenes: Sequence[str]
) -> list[Ref]:
    """The scenes that match. Raises UsageError if there are none."""
    found = [ref for ref in refs if selected(ref.id, scenes)]
    if not found:
        raise UsageError(
            f"--scenes {' '.join(scenes)}: matches no scene of {root}; give a pattern such as "
            "'r2r/*' for its group and name, or its name alone."
        )
    return found


def _checked[Ref: EpisodeRef | SceneRef](builder: DatasetBuilder, refs: list[Ref]) -> list[Ref]:
    seen = Counter(ref.id for ref in refs)
    if twice := [name for name, count in seen.items() if count > 1]:
        raise UsageError(f"{builder.root}: holds the episode {twice[0]} twice; rename one of them.")
    return refs


def choose_engine(
    builder: DatasetBuilder,
    refs: Sequence[EpisodeRef | SceneRef],
    name: str = AUTO,
    weights: Path | None = None,
    device: str | None = None,
    license: License = "any",
) -> Engine:
    """The engine for these episodes: the given one, or the builder's default.

    `auto` looks for weights only if some episode has no depth. For scenes that are not fetched yet,
    this is unknown, so weights are used if they exist. Raises UsageError if the engine, its weights
    or the device is not available, or if its weights allow less than `license`. If some episodes
    have depth and no weights were given, it is not raised: the other episodes then fail one by one.
    """
    name = builder.engine if name == AUTO else name
    commercial = license == "commercial"
    if name != AUTO:
        engine = load_engine(name, weights, device)
        if commercial:
            check_license(engine)
        return engine
    have = [_has_depth(builder, ref) for ref in refs if isinstance(ref, EpisodeRef)]
    if len(have) < len(refs):
        try:
            with without_downloads():
                auto = Auto(network_engine(weights, device, commercial=commercial))
            if commercial:
                check_license(auto)
            return auto
        except UsageError as error:
            if weights is not None:
                raise
            return Auto(None, str(error).splitlines()[0].rstrip("."))
    if all(have):
        if weights is not None:
            raise UsageError(
                f"--weights {weights}: all episodes have depth, which is used instead; "
                "choose one with --engine, or leave the option out."
            )
        return Auto()
    try:
        auto = Auto(network_engine(weights, device, commercial=commercial))
        if commercial:
            check_license(auto)
        return auto
    except UsageError as error:
        if weights is not None or not any(have):
            raise
        return Auto(None, str(error).splitlines()[0].rstrip("."))


def _has_depth(builder: DatasetBuilder, ref: EpisodeRef) -> bool:
    """Whether an episode has depth. True for an error, which occurs again when it is built."""
    try:
        return builder.has_depth(ref)
    except Exception:  # Sources come from other packages.
        return True


def network_estimates(
    job: Job, refs: Sequence[EpisodeRef | SceneRef]
) -> dict[str, NetworkEstimate]:
    """Estimates for the network for each of the episodes, by id, as far as known."""
    from occgen_hub.engines.network import NetworkEngine

    found = {}
    for ref in refs:
        if not isinstance(ref, EpisodeRef):
            continue  # A scene's episodes are not known yet.
        footage = job.builder.footage(ref)
        if footage is None:
            continue
        has_depth = _has_depth(job.builder, ref)
        try:
            engine = job.settings.engine.for_episode(ref.id, has_depth=has_depth)
        except OccGenError:
            continue
        if isinstance(engine, NetworkEngine):
            length, image_size = footage
            found[ref.id] = engine.estimate(length, image_size, job.settings.config)
    return found


def check_conditions(
    builder: DatasetBuilder, refs: Sequence[EpisodeRef | SceneRef], config: Config
) -> None:
    """Raise UsageError for a network input that no episode of the source has."""
    for condition in config.condition:
        if condition == "depth":
            there = any(isinstance(ref, SceneRef) or _has_depth(builder, ref) for ref in refs)
        else:
            there = condition in builder.knows
        if not there:
            raise UsageError(
                f"--condition {condition}: the source {builder.name} has none at {builder.root}; "
                "leave it out."
            )


@dataclass(frozen=True)
class Job:
    """The episodes of a source to build, their output and settings.

    refs: episodes, and scenes whose episodes are unknown until they are fetched;
    parquet_occupancy: whether to write the occupancy also as Parquet; parquet_images: whether
    these files have images, depth and tasks; limited: whether the source has more than `refs`;
    whole_scenes: whether a shard has all episodes of its scenes; device: where networks run, None
    for a GPU if there is one; hub: the source of scenes to download, at a commit; scratch: folder
    for fetched scenes, None for the hidden folder `.scratch` of the output.
    """

    builder: DatasetBuilder
    refs: Sequence[EpisodeRef | SceneRef]
    out: Path
    settings: Settings
    parquet_occupancy: bool = True
    limited: bool = False
    device: str | None = None
    hub: HubSource | None = None
    scratch: ScratchPlace | None = None
    parquet_images: bool = False
    whole_scenes: bool = False

    def part(self, workers: int) -> Job:
        """The job for one of `workers` processes, which receive episodes one by one."""
        return replace(self, refs=(), scratch=self.scratch_place.shared(workers))

    @property
    def scratch_place(self) -> ScratchPlace:
        """The scratch for scenes during the build."""
        return self.scratch or ScratchPlace(self.out / ".scratch")

    def work(self, ref: EpisodeRef | SceneRef) -> float:
        """Estimate the work of an episode or a scene, relative to others of its kind."""
        if isinstance(ref, SceneRef):
            return float(ref.bytes)
        try:
            return self.builder.work(ref)
        except Exception:  # An error of a source's code. It occurs again when the episode is built.
            return 0.0

    def on(self, device: str | None) -> Job:
        """The same job with its network on another device; None for a GPU if there is one.

        Raises UsageError if the device does not exist.
        """
        engine, segmenter = self.settings.engine.on(device), self.settings.segmenter
        segmenter = None if segmenter is None else segmenter.on(device)
        settings = replace(self.settings, engine=engine, segmenter=segmenter)
        return replace(self, settings=settings, device=device)

    def why_scene_outdated(self, ref: SceneRef, record: SceneRecord | None) -> str | None:
        """Why a scene would be fetched. None if all its episodes are up to date."""
        if self.settings.overwrite:
            return "exists, --overwrite"
        schema = load_schema(self.builder.schema)
        return why_scene_outdated(ref, record, self.out, self.scene_choices, schema)

    def reason_to_build(self, ref: EpisodeRef | SceneRef) -> str | None:
        """Why an episode or a scene would be built or tried. None if it is up to date."""
        try:
            if isinstance(ref, SceneRef):
                reason = self.why_scene_outdated(ref, read_scene(self.out, ref.id))
            else:
                reason = why_outdated(self.builder, ref, self.out, self.settings)
        except OccGenError as error:
            return f"would fail: {error}"
        if reason is None and not self.settings.overwrite:
            return None
        return f"to build: {reason or 'exists, --overwrite'}"

    def device_name(self) -> str:
        """The device of its networks, "cpu" without networks."""
        if not self.settings.engine.uses_device():
            return "cpu"
        import torch

        return self.device or ("cuda" if torch.cuda.is_available() else "cpu")

    @property
    def choices(self) -> str:
        """The settings that determine its files. They do not depend on the process or machine."""
        return dump_json([self.scene_choices, self.settings.media])

    @cached_property
    def scene_choices(self) -> str:
        """The settings for the record of a scene. They do not depend on the machine."""
        engine = self.settings.engine
        network = engine.network if isinstance(engine, Auto) else engine
        schema = load_schema(self.builder.schema)
        settings = [
            *(self.builder.name, self.builder.version, str(self.builder.cameras)),
            *(schema.name, schema.version, engine.name, network and network.weights()),
            *(self.settings.config.model_dump(mode="json"), self.settings.media == "none"),
        ]
        if self.settings.segmenter is not None:
            settings.append(self.settings.segmenter.record())
        return digest(dump_json(settings))

    def source_state(self, refs: Sequence[EpisodeRef | SceneRef]) -> str:
        """A digest of the sources and settings of a scene. Raises SourceError.

        refs: the scene, if it has to be fetched, or all its episodes. This reads their files, and
        an archive if its time differs from its record.
        """
        first = refs[0]
        if not isinstance(first, SceneRef):
            episodes = [ref for ref in refs if isinstance(ref, EpisodeRef)]
            return self._state({r.id: self.builder.fingerprint(self.builder.sources(r))
                                for r in episodes})  # fmt: skip
        if first.files:
            return self._state({first.id: first.stamp})
        record = read_scene(self.out, first.id)
        known = record is not None and record.stamp == first.stamp
        content = record.sha256 if known and record else sha256(first.path)
        return self._state({first.id: content})

    def built_state(self, refs: Sequence[EpisodeRef | SceneRef]) -> str | None:
        """Like `source_state`, from the records of the scene's built episodes."""
        first = refs[0]
        if isinstance(first, SceneRef):
            record = read_scene(self.out, first.id)
            good = record is not None and not record.failed
            good = good and record is not None and record.choices == self.scene_choices
            return self._state({first.id: record.sha256}) if good and record else None
        found = {}
        for ref in refs:
            found[ref.id] = str(Trajectory.open(self.out / ref.id).record["source"]["fingerprint"])
        return self._state(found)

    def _state(self, sources: dict[str, str]) -> str:
        return digest(dump_json([sorted(sources.items()), self.scene_choices]))

    def described(self) -> dict[str, Any]:
        """The description for a report."""
        settings = self.settings
        place = self.builder.root
        root = printable(str(self.hub or HubSource.of_snapshot(place) or place))
        source: dict[str, Any] = {"builder": self.builder.name, "root": root}
        if cameras := [camera.as_json() for camera in self.builder.cameras]:
            source["cameras"] = cameras
        return {
            "source": source,
            "output": printable(str(self.out)),
            "engine": settings.engine.name,
            "config": settings.config.model_dump(mode="json"),
            "media": settings.media,
            **({} if settings.segmenter is None else {"segmenter": settings.segmenter.record()}),
        }


def open_source(
    source: str,
    root: Path | str,
    cameras: Sequence[CameraMapping] = (),
    *,
    hfov: float | None = None,
) -> tuple[DatasetBuilder, HubSource | None]:
    """The builder for an --input, and the source on the Hub from which to fetch its scenes.

    For a LeRobot dataset on the Hub, the meta files are downloaded, and their folder is the
    builder's root. Raises UsageError, and HubSourceError if the download fails.
    """
    hub = HubSource.parse(root)
    builder = load_builder(source, Path(root), cameras, hfov=hfov)
    repository = hub or HubSource.named(root)
    if builder.takes_repository and repository is not None:
        return builder.at(repository.snapshot("meta/**")), None
    return builder, hub


def open_job(
    source: str,
    root: Path | str,
    out: Path,
    *,
    cameras: Sequence[CameraMapping] = (),
    engine: str = AUTO,
    weights: Path | None = None,
    device: str | None = None,
    config: Config | None = None,
    media: Media | None = None,
    limit: int | None = None,
    overwrite: bool = False,
    parquet_occupancy: bool = True,
    license: License = "any",
    parquet_images: bool = False,
    scenes: Sequence[str] = (),
    scratch: Path | None = None,
    scratch_limit: int = DEFAULT_LIMIT,
    whole_scenes: bool = False,
    segmenter: str | None = None,
    segmenter_weights: Path | None = None,
) -> Job:
    """The job for options of `occgen-hub build` with these names. Builds nothing.

    media: None for the source's default; scratch_limit: in bytes; whole_scenes: see Job. Raises
    UsageError for invalid options, and HubSourceError if the Hub cannot list `root`.
    """
    if parquet_images and not parquet_occupancy:
        raise UsageError("--parquet-images: needs --parquet-occupancy.")
    config = config or Config()
    builder, hub = open_source(source, root, cameras, hfov=config.hfov)
    refs: Sequence[EpisodeRef | SceneRef]
    if hub is None:
        check_paths(builder.root, out)
        refs = list_refs(builder, limit, scenes)
    else:
        if not builder.takes_archives:
            raise UsageError(
                f"--source {source}: is not read from the Hub; download {hub} and give its folder."
            )
        hub, listed = hub.listed()
        builder.license = hub.license
        found: list[EpisodeRef | SceneRef] = [*_selected(hub, select_scenes(listed, hub), scenes)]
        refs = _checked(builder, found[:limit])
    if whole_scenes and limit is not None and any(isinstance(ref, EpisodeRef) for ref in refs):
        raise UsageError("--limit: could push an incomplete scene; choose scenes with --scenes.")
    for ref in refs:
        if isinstance(ref, EpisodeRef):
            check_replaceable(out / ref.id, load_schema(builder.schema))
    chosen = choose_engine(builder, refs, engine, weights, device, license)
    chosen.check(config)
    check_conditions(builder, refs, config)
    if segmenter is None and segmenter_weights is not None:
        raise UsageError("--segmenter-weights: needs --segmenter; give that too.")
    labeller = None if segmenter is None else load_segmenter(segmenter, segmenter_weights, device)
    settings = Settings(config, chosen, media or builder.media, overwrite, labeller)
    limited = limit is not None or bool(scenes)
    place = ScratchPlace((scratch or out / ".scratch").absolute(), scratch_limit)
    return Job(
        *(builder, refs, out, settings, parquet_occupancy, limited, device, hub, place),
        parquet_images=parquet_images,
        whole_scenes=whole_scenes,
    )
