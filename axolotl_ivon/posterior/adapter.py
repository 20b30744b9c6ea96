"""An adapter folder on the disk: its files, and the checks that they belong together."""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterator, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..errors import IVONError
from ..reporter import SILENT, Reporter
from ..storage.atomic import new_file
from ..storage.format import (
    CONFIG_FILE,
    FORMAT,
    FORMAT_VERSION,
    MEAN_FILE,
    NEXT_SIGMA_FILE,
    SIGMA_FILE,
    natural_order,
    read_json,
    resolve,
)
from ..storage.tensorfile import TensorFile
from .tensors import Tensors, as_float32, fingerprint, sha256, write_tensors

if TYPE_CHECKING:
    import torch

# In the header: `mean_sha256` before pruning; the runs (of training, of a fit) that a posterior is from, by their ids.
UNPRUNED, RUN_IDS, TRAINING_TAU = "unpruned_sha256", "run_ids", "training_tau"
SIGMA_SHA256 = "sigma_sha256"  # of σ as it was trained, fitted or combined: tempering and pruning leave it
_UNCHANGED = {"tau": 1.0, TRAINING_TAU: 1.0, "pruned_ratio": 0.0}


def changes_base(config: Mapping[str, Any]) -> bool:
    """Say whether PEFT writes what is left of the base model's weights in their place, also on loading."""
    start = str(config.get("init_lora_weights")).lower()
    return start.startswith(("pissa", "olora", "corda", "loftq", "lora_ga"))


def _positive(value: float) -> bool:
    return value > 0


def posterior_number(header: Mapping[str, str], name: str) -> float:
    """Return "tau", "training_tau" or "pruned_ratio" of the header of σ, by default that of an unchanged posterior."""
    return float(header.get(name, _UNCHANGED[name]))


def mean_sha256(tensors: Mapping[str, torch.Tensor]) -> str:
    """Return the fingerprint of an adapter's tensors: names, dtypes, shapes and bytes, in any order.

    It is the SHA-256 of the JSON list, sorted by name, of [name, dtype as in safetensors, shape, SHA-256 of
    the row-major little-endian bytes].
    """
    held = Tensors.of(tensors)
    return fingerprint(held, held.each(lambda key: sha256(held.raw(key))))


class Adapter:
    """A PEFT adapter folder on the disk: configuration, tensors, and σ where there is one.

    Attributes:
        folder: where it is (for a Hub id, the local copy).
        config: adapter_config.json.
        mean, mean_metadata: the tensors of adapter_model.safetensors, and its header.
        sigma, metadata: those of ivon_sigma.safetensors; `sigma` is None where there is no such file.

    Raises:
        IVONError: the folder is no complete adapter, or σ has other names, shapes or dtypes than it must.
    """

    def __init__(self, path_or_hub_id: str | os.PathLike[str]) -> None:
        self.folder = resolve(path_or_hub_id)
        self.config = read_json(self.folder / CONFIG_FILE)
        if not (self.folder / MEAN_FILE).exists() and (self.folder / "adapter_model.bin").exists():
            raise IVONError(
                f"{self.folder} holds its adapter as a pickle, which is never read; convert it to "
                f"{MEAN_FILE}: load it with PEFT where you trust it, and save it with save_pretrained"
            )
        file = TensorFile(self.folder / MEAN_FILE)
        self.mean = Tensors.of_file(file)
        self.mean_metadata = file.metadata
        self.sigma: Tensors | None = None
        self.metadata: dict[str, str] = {}
        path = self.folder / SIGMA_FILE
        # Asked first: an exception's frames would keep this adapter's files open until the next garbage collection.
        if os.path.lexists(self.folder / NEXT_SIGMA_FILE):
            with contextlib.suppress(IVONError):  # a save was cut off, or goes on: see storage.atomic.updated_adapter
                waiting = TensorFile(self.folder / NEXT_SIGMA_FILE)
                if waiting.metadata.get("mean_sha256") == fingerprint(self.mean, self.digests()):
                    path = waiting.path
        if os.path.lexists(path):
            file = TensorFile(path)
            _check_header(file)
            self.sigma = Tensors.of_file(file)
            self.metadata = file.metadata
            _check_names(file.path, self.mean, self.sigma)

    def digests(self, reporter: Reporter = SILENT) -> dict[str, str]:
        """Return the SHA-256 of every tensor of the mean, whose values are checked on the way.

        Raises:
            IVONError: a value is NaN or infinite.
        """

        def digest(key: str) -> str:
            raw = self.mean.raw(key)
            if self.mean.is_float(key):
                _check_finite(self.folder / MEAN_FILE, key, as_float32(raw))
            return sha256(raw)

        return self.mean.each(digest, f"reading {MEAN_FILE}", reporter)

    def check_pair(self, reporter: Reporter = SILENT) -> dict[str, str]:
        """Return `digests`, after a check that σ belongs to this mean.

        Raises:
            IVONError: it belongs to another one, or a value of the mean is NaN or infinite.
        """
        digests = self.digests(reporter)
        if self.metadata.get("mean_sha256") != fingerprint(self.mean, digests):
            raise IVONError(
                f"{self.folder / SIGMA_FILE} belongs to another {MEAN_FILE} (mean_sha256 differs); "
                "put the two files of one save together, or remove the σ of an earlier run"
            )
        return digests


def modules(tensors: Tensors) -> dict[str, list[str]]:
    """Return the names of each module's tensors, modules in their natural order (layer 2 before layer 10)."""
    names: dict[str, list[str]] = {}
    for key in sorted(tensors):
        module = key.removeprefix("base_model.model.")
        module = re.sub(r"\.(lora_[A-Za-z_]+|modules_to_save|base_layer)\b.*$|\.(weight|bias)$", "", module)
        names.setdefault(module, []).append(key)
    return dict(sorted(names.items(), key=lambda item: natural_order(item[0])))


def different_shapes(one: Tensors, other: Tensors) -> Iterator[tuple[str, list[int] | None, list[int] | None]]:
    """Yield (name, shape, other shape) of the tensors that two adapters do not share; None where one has none."""
    for key in sorted(one.specs.keys() | other.specs.keys()):
        first, second = (list(tensors.specs[key][1]) if key in tensors else None for tensors in (one, other))
        if first != second:
            yield key, first, second


def _check_header(file: TensorFile) -> None:
    header = file.metadata
    if header.get("format") != FORMAT:
        raise IVONError(f"{file.path}: format is {header.get('format')!r}; axolotl-ivon writes {FORMAT!r}")
    if header.get("format_version") != FORMAT_VERSION:
        raise IVONError(
            f"{file.path}: format_version is {header.get('format_version')!r}; this version of axolotl-ivon "
            f"reads {FORMAT_VERSION!r}: upgrade it"
        )
    for name, good in (("tau", _positive), (TRAINING_TAU, _positive), ("pruned_ratio", lambda x: 0 <= x <= 1)):
        try:
            valid = good(posterior_number(header, name))
        except ValueError:
            valid = False
        if not valid:
            raise IVONError(f"{file.path}: {name} is {header[name]!r}, which axolotl-ivon never writes")


def _check_names(path: Path, mean: Tensors, sigma: Tensors) -> None:
    for key, shape, sigma_shape in different_shapes(mean, sigma):
        if sigma_shape is None:
            raise IVONError(f"{path}: no σ for {key}, which {MEAN_FILE} has")
        if shape is None:
            raise IVONError(f"{path}: σ for {key}, which {MEAN_FILE} does not have")
        raise IVONError(f"{path}: σ of {key} has shape {sigma_shape}, its mean {shape}; put files of one save together")
    for key, (dtype, _) in sigma.specs.items():
        if dtype != "F32":
            raise IVONError(f"{path}: σ of {key} has dtype {dtype}; it must be F32")


def _check_finite(path: Path, key: str, values: np.ndarray) -> None:
    # A NaN anywhere makes both extremes NaN.
    if values.size and not (np.isfinite(values.min()) and np.isfinite(values.max())):
        raise IVONError(f"{path}: {key} holds NaN or infinite values; use an earlier checkpoint")


def check_sigma(path: Path, sigma: Tensors, reporter: Reporter = SILENT) -> None:
    """Check every value of σ, which is read from `path` or written there.

    Raises:
        IVONError: one is NaN, infinite or negative.
    """

    def check(key: str) -> None:
        values = sigma.raw(key)
        _check_finite(path, key, values)
        if values.size and values.min() < 0:
            raise IVONError(f"{path}: σ of {key} has negative values; a standard deviation is ≥ 0")

    sigma.each(check, f"reading {SIGMA_FILE}", reporter)


def save_sigma(folder: str | os.PathLike[str], sigma: Mapping[str, torch.Tensor], header: Mapping[str, str]) -> None:
    """Write ivon_sigma.safetensors beside the adapter_model.safetensors in `folder`, whole or not at all.

    Args:
        sigma: the standard deviations, under the names and in the shapes of the adapter's tensors.
        header: what the run knows. Format, version and the fingerprints of mean and σ are added; so are τ = 1 and
            pruned ratio 0 if it has none.

    Raises:
        IVONError: names or shapes differ from the adapter's, σ is negative, NaN or infinite, or the file
            cannot be written.
    """
    target = Path(folder) / SIGMA_FILE
    mean = Tensors.of_file(TensorFile(Path(folder) / MEAN_FILE))
    held = Tensors.of({key: value.float() for key, value in sigma.items()})
    _check_names(target, mean, held)
    check_sigma(target, held)
    with new_file(target) as path:
        write_sigma(path, held, {"tau": "1.0", "pruned_ratio": "0.0", **header}, mean_sha256(mean))


def write_sigma(
    path: Path,
    sigma: Tensors,
    header: Mapping[str, str],
    mean_fingerprint: str,
    reporter: Reporter = SILENT,
    sigma_fingerprint: str | None = None,
) -> None:
    """Write σ with `header`, to which format, version and the fingerprints of its mean and its own are added.

    `sigma_fingerprint` is that of the σ which this one was made of by tempering and pruning, if it was.
    """
    header = {
        **header,
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "library_version": version("axolotl-ivon"),
        "mean_sha256": mean_fingerprint,
        **({SIGMA_SHA256: sigma_fingerprint} if sigma_fingerprint else {}),
    }
    write_tensors(path, sigma, header, reporter, signed=None if sigma_fingerprint else SIGMA_SHA256)
