"""The weights of networks: finding, downloading and checking them, and loading a network."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import resources
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from occgen_hub.engines.pi3.sizes import Sizes
from occgen_hub.errors import SourceError, UsageError, shorten_message
from occgen_hub.files import read_json, sha256
from occgen_hub.hub_token import check_sendable

if TYPE_CHECKING:
    import torch

    from occgen_hub.engines import MissingWeights
    from occgen_hub.engines.pi3.network import Pi3, Pi3X

logger = logging.getLogger(__name__)

Pi3Name = Literal["pi3", "pi3x"]
Name = Literal["pi3", "pi3x", "da3"]
NAMES: tuple[Name, ...] = ("pi3x", "pi3", "da3")
"""In order of preference: pi3x comes first because it gives metres without known poses."""

FILE = "model.safetensors"
LICENSES = {
    "cc-by-nc-4.0": "CC BY-NC 4.0, which allows no commercial use",
    "apache-2.0": "Apache-2.0, which allows commercial use",
}

DA3_WIDTHS = {384: "da3-small", 768: "da3-base", 1024: "da3-large"}
"""The models of Depth Anything 3 that estimate cameras, by the width of their tokens."""

DA3_APACHE = ("da3-small", "da3-base")
"""The models published under Apache-2.0; the larger ones are non-commercial."""

_DA3_WIDTH = "model.backbone.pretrained.cls_token"
"""The tensor whose last dimension is the width of the tokens."""


class Checkpoint(BaseModel):
    """The config.json of a checkpoint: its network, its repository on the Hub, and its licence."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    network: Name
    repo_id: str | None = None
    revision: str = "main"
    sha256: str | None = Field(None, pattern="^[0-9a-f]{64}$")
    license: str = "unknown"
    sizes: Sizes = Field(default_factory=Sizes)
    preset: str = Field("da3-base", pattern="^da3-(small|base|large)$")

    @model_validator(mode="after")
    def _check_pose_blocks(self) -> Checkpoint:
        if self.network == "pi3x" and self.sizes.pose_blocks[-1] >= self.sizes.decoder_depth:
            raise ValueError("pose_blocks must be numbers of the decoder's blocks")
        return self

    @property
    def terms(self) -> str:
        """The licence in words."""
        return LICENSES.get(self.license, self.license)


@dataclass(frozen=True)
class Weights:
    """A safetensors file and its description. digest: its SHA-256, empty if not known.

    For a plan, the file of published weights may be missing.
    """

    path: Path
    checkpoint: Checkpoint
    digest: str = ""

    def bytes(self) -> int:
        """Size of the file; for a missing one, the size of its tensors in float32."""
        if self.path.is_file():
            return self.path.stat().st_size
        return 4 * sum(prod(shape) for shape in _expected(self.checkpoint).values())

    def record(self) -> dict[str, Any]:
        """The record of the weights in a dataset."""
        return {
            "network": self.checkpoint.network,
            "sha256": self.digest,
            "license": self.checkpoint.license,
            "repo_id": self.checkpoint.repo_id,
        }


COMMERCIAL = ("apache-2.0", "mit", "bsd-2-clause", "bsd-3-clause", "isc", "cc-by-4.0", "cc0-1.0")
"""Licences that allow commercial use of weights, by the Hub's names."""


class WeightsError(UsageError):
    """Weights are missing, damaged, or belong to another network."""

    has_lines = True


def published(name: Name) -> Checkpoint:
    """The description of the checkpoint published by the authors of a network."""
    text = (resources.files("occgen_hub.ckpt") / name / "config.json").read_text("utf-8")
    return Checkpoint.model_validate(json.loads(text))


def manual_paths(name: Name) -> list[Path]:
    """The paths for weights placed by hand: in the working folder, and beside the package."""
    inside = resources.files("occgen_hub.ckpt") / name / FILE
    return [Path("ckpt", name, FILE), Path(str(inside))]


def local_weights(name: Name) -> Path | None:
    """The local weights of a network, placed by hand or in the Hub's cache; else None."""
    return next((path for path in manual_paths(name) if path.is_file()), None) or _cached(name)


def find_weights(
    name: Name, path: Path | None = None, *, missing: MissingWeights = "fetch"
) -> Weights:
    """Find and check the weights of a network, and compute their SHA-256.

    path: a file, or a folder with one; None takes local weights. missing: what to do if there are
    none, see `MissingWeights`. Raises WeightsError if there are no weights, or if they are damaged
    or belong to another network.
    """
    if path is not None:
        weights = _weights_at(name, path)
    elif (local := local_weights(name)) is not None:
        weights = _with_checkpoint(name, local)
    elif missing == "fetch":
        weights = download_weights(name)
    elif missing == "expect":
        checkpoint = published(name)
        return Weights(manual_paths(name)[0], checkpoint, checkpoint.sha256 or "")
    else:
        raise missing_error(name)
    check(weights)
    return Weights(weights.path, weights.checkpoint, _digest(weights.path))


def identify_network(path: Path) -> Name:
    """The network to which the weights at `path` belong, by the names of their tensors."""
    layout = _layout(_file(path))
    if any(name.startswith("model.") for name in layout):
        return "da3"
    return "pi3x" if "metric_token" in layout else "pi3"


def download_weights(name: Name, revision: str | None = None) -> Weights:
    """Download published weights into the Hub's cache. Raises WeightsError if that fails.

    Logs their licence as a warning, so that it is on the terminal by default.
    """
    from huggingface_hub import get_hf_file_metadata, hf_hub_download, hf_hub_url
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled
    from huggingface_hub.utils import httpx

    checkpoint = published(name)
    if revision is not None:
        checkpoint = checkpoint.model_copy(update={"revision": revision, "sha256": None})
    assert checkpoint.repo_id is not None
    check_sendable()
    try:
        # First a short request, because a download would retry for half a minute if the Hub cannot
        # be reached.
        get_hf_file_metadata(
            hf_hub_url(checkpoint.repo_id, FILE, revision=checkpoint.revision), timeout=10
        )
        logger.warning(
            "Fetching %s of %s. Licence of these weights: %s.",
            FILE, checkpoint.repo_id, checkpoint.terms,
        )  # fmt: skip
        path = hf_hub_download(checkpoint.repo_id, FILE, revision=checkpoint.revision)
    except (HfHubHTTPError, OfflineModeIsEnabled, httpx.HTTPError, OSError) as error:
        raise missing_error(name, shorten_message(str(error)) or type(error).__name__) from error
    return Weights(Path(path), checkpoint)


def missing_error(name: Name, reason: str = "") -> WeightsError:
    """The error for missing weights. reason: why a download failed, if there was one."""
    checkpoint = published(name)
    failure = f"; {checkpoint.repo_id} could not be downloaded ({reason})" if reason else ""
    return WeightsError(
        f"there are no weights for {name} (licence: {checkpoint.terms}): none at "
        f"ckpt/{name}/{FILE}, none in the Hub's cache{failure}.\n"
        f"Download them on a machine that reaches the Hub: occgen-hub weights pull {name}\n"
        f"Or copy {FILE} of {checkpoint.repo_id} to ckpt/{name}/{FILE}, or give its path with "
        f"--weights."
    )


def _cached(name: Name) -> Path | None:
    from huggingface_hub import try_to_load_from_cache

    checkpoint = published(name)
    assert checkpoint.repo_id is not None
    path = try_to_load_from_cache(checkpoint.repo_id, FILE, revision=checkpoint.revision)
    return Path(path) if isinstance(path, str) else None


def _file(path: Path) -> Path:
    return path / FILE if path.is_dir() else path


def _weights_at(name: Name, path: Path) -> Weights:
    weights = _with_checkpoint(name, _file(path))
    if weights.checkpoint.network != name:
        raise WeightsError(
            f"{path}: has weights of {weights.checkpoint.network}, according to its config.json, "
            f"not of {name}; choose --engine {weights.checkpoint.network} or other --weights."
        )
    return weights


def _with_checkpoint(name: Name, path: Path) -> Weights:
    """Weights with the description in the config.json beside them, or the published description.

    A config.json in the authors' own format, as in a download of the whole repository, is ignored.
    """
    config = path.with_name("config.json")
    if not config.is_file():
        return Weights(path, _as_published(name, path))
    try:
        described = read_json(config)
        if "network" not in described:
            return Weights(path, _as_published(name, path))
        return Weights(path, Checkpoint.model_validate(described))
    except SourceError as error:
        raise WeightsError(str(error)) from error
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        where = ".".join(str(part) for part in first["loc"])[:80]
        raise WeightsError(
            f"{config}: does not describe a checkpoint ({where}: {first['msg'][:120]}); see "
            f"ckpt/{name}/config.json for an example."
        ) from error


def _as_published(name: Name, path: Path) -> Checkpoint:
    """The published description for a file; for da3 that of the model with the file's width."""
    checkpoint = published(name)
    if name != "da3" or not path.is_file():
        return checkpoint
    width = _layout(path).get(_DA3_WIDTH, (0,))[-1]
    preset = DA3_WIDTHS.get(width, checkpoint.preset)
    if preset == checkpoint.preset:
        return checkpoint
    license = checkpoint.license if preset in DA3_APACHE else "cc-by-nc-4.0"
    other = {"preset": preset, "license": license, "repo_id": None, "sha256": None}
    return checkpoint.model_copy(update=other)


def _digest(path: Path) -> str:
    """SHA-256 of the file. In the Hub's cache it is the file's name."""
    stored = path.resolve().name
    if path.is_symlink() and len(stored) == 64 and set(stored) <= set("0123456789abcdef"):
        return stored
    return sha256(path)


# Checks


def verify(weights: Weights) -> str:
    """Compute the SHA-256 of the whole file.

    Raises WeightsError if it differs from the one in the checkpoint's description.
    """
    digest, stated = sha256(weights.path), weights.checkpoint.sha256
    if stated is not None and digest != stated:
        raise WeightsError(
            f"{weights.path}: is not the published file (SHA-256 {digest[:12]}..., expected "
            f"{stated[:12]}...); download it again or, for other weights, add a config.json that "
            "describes them."
        )
    return digest


def check(weights: Weights) -> None:
    """Raise WeightsError unless the file is complete and has exactly the network's tensors.

    Only the header is read. It states the file's length.
    """
    shapes = _expected(weights.checkpoint)
    _compare(shapes, _layout(weights.path), weights.checkpoint.network, str(weights.path))


def _expected(checkpoint: Checkpoint) -> dict[str, tuple[int, ...]]:
    """The names and shapes of a network's tensors."""
    import torch

    if checkpoint.network == "da3":
        from occgen_hub.engines.da3 import tensor_shapes

        return tensor_shapes(checkpoint.preset)
    with torch.device("meta"):
        expected = _build(checkpoint.network, checkpoint.sizes).state_dict()
    return {name: tuple(tensor.shape) for name, tensor in expected.items()}


def _layout(path: Path) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the tensors in a file's header. Raises WeightsError if damaged."""
    from safetensors import SafetensorError, safe_open

    if not path.is_file():
        raise WeightsError(f"{path}: does not exist; check --weights.")
    try:
        with safe_open(path, framework="numpy") as file:
            return {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError, ValueError) as error:
        reason = str(error).removeprefix("Error while deserializing header: ").rstrip(".")
        raise WeightsError(
            f"{path}: is not a complete safetensors file ({reason[:120]}); download it again."
        ) from error


def _compare(
    expected: Mapping[str, tuple[int, ...]],
    found: Mapping[str, tuple[int, ...]],
    network: str,
    where: str,
) -> None:
    problems = {
        "missing tensors": [name for name in expected if name not in found],
        "unexpected tensors": [name for name in found if name not in expected],
        "tensors with another shape": [
            f"{name} {list(found[name])} instead of {list(shape)}"
            for name, shape in expected.items()
            if name in found and found[name] != shape
        ],
    }
    parts = [f"{kind}: {_shorten(names)}" for kind, names in problems.items() if names]
    if parts:
        raise WeightsError(
            f"{where}: not a checkpoint of {network} with these sizes ({'; '.join(parts)}); check "
            "--engine, and the config.json beside the file."
        )


def _shorten(names: list[str]) -> str:
    shown = ", ".join(name[:80] for name in names[:5])
    return shown if len(names) <= 5 else f"{shown} and {len(names) - 5} more"


# The network


def load_network(
    name: Pi3Name,
    weights: str | Path | Mapping[str, torch.Tensor],
    *,
    sizes: Sizes | None = None,
    device: str | torch.device = "cpu",
) -> Pi3 | Pi3X:
    """Load the network pi3 or pi3x in evaluation mode.

    weights: a safetensors file, a folder with model.safetensors, or the tensors by name; sizes: by
    default those in the config.json beside the file, else the published ones. On a CPU, a float32
    file is mapped into memory, not copied. Raises WeightsError if the weights do not fit.
    """
    import torch

    if name not in ("pi3", "pi3x"):
        raise WeightsError(f"{name}: unknown network; choose pi3 or pi3x.")
    if isinstance(weights, str | Path):
        found = _weights_at(name, Path(weights))
        sizes = sizes or found.checkpoint.sizes
        check(Weights(found.path, found.checkpoint.model_copy(update={"sizes": sizes})))
        tensors = tensors_of(found.path, device)
    else:
        sizes = sizes or published(name).sizes
        tensors = {k: torch.as_tensor(v, device=device).float() for k, v in weights.items()}
    with torch.device("meta"):
        network = _build(name, sizes)
    shapes = {key: tuple(tensor.shape) for key, tensor in network.state_dict().items()}
    _compare(shapes, {k: tuple(t.shape) for k, t in tensors.items()}, name, "the weights")
    network.load_state_dict(tensors, strict=True, assign=True)
    return network.requires_grad_(False).eval()


def _build(name: Pi3Name, sizes: Sizes) -> Pi3 | Pi3X:
    from occgen_hub.engines.pi3.network import NETWORKS

    return NETWORKS[name](sizes)


def tensors_of(path: Path, device: str | torch.device) -> dict[str, torch.Tensor]:
    """The tensors of a file as float32. On a CPU, float32 files are mapped into memory."""
    from safetensors import safe_open

    with safe_open(path, framework="pt", device=str(device)) as file:
        return {name: file.get_tensor(name).float() for name in file.keys()}  # noqa: SIM118
