"""The files of an adapter: their names, JSON that is checked on reading, and folders from the Hub."""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import stat
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path, PurePath
from typing import Any

from ..errors import IVONError, one_line, param_ref

CONFIG_FILE = "adapter_config.json"
MEAN_FILE = "adapter_model.safetensors"
SIGMA_FILE = "ivon_sigma.safetensors"
MODEL_CONFIG_FILE = "config.json"  # of a whole model
NEXT_SIGMA_FILE = ".ivon_sigma.safetensors.next"  # while the mean that it belongs to is being replaced
ENSEMBLE_FILE = "ensemble.json"
RECOMMENDED_FILE = "recommended.json"

FORMAT = "ivon-lora"
FORMAT_VERSION = "1"

TOKENIZER_FILES = (
    "added_tokens.json",
    "chat_template.jinja",
    "merges.txt",
    "special_tokens_map.json",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "vocab.json",
)
# What axolotl and the Trainer save beside an adapter that belongs to it: the model card and the tokenizer.
# Optimizer states and their like belong to a checkpoint and stay there.
COMPANIONS = ("README.md", *TOKENIZER_FILES)

_HUB_NAME = r"[A-Za-z0-9][\w.-]*"
_HUB_ID = re.compile(f"{_HUB_NAME}/{_HUB_NAME}")
_JSON_LIMIT = 16 * 2**20


def resolve(source: str | os.PathLike[str]) -> Path:
    """Return the folder that `source` names: a folder, or the local copy of a Hugging Face Hub id.

    The Hub is asked only when there is no such folder and `source` has the form `owner/name`.

    Raises:
        IVONError: there is neither.
    """
    path = Path(source)
    if path.is_dir():
        return path
    if path.exists():
        raise IVONError(f"{path} is a file; give the adapter's folder instead")
    if not _HUB_ID.fullmatch(str(source)):
        raise IVONError(f"{path}: no such folder")
    from huggingface_hub import snapshot_download

    try:
        files = [CONFIG_FILE, MEAN_FILE, SIGMA_FILE, RECOMMENDED_FILE, *COMPANIONS]
        return Path(snapshot_download(str(source), allow_patterns=files))
    except Exception as error:  # the client raises a dozen kinds, requests' and httpx' among them
        raise IVONError(f"{source}: no such folder here, and not found on the Hub ({type(error).__name__})") from error


def find_base_model(config: Mapping[str, Any], adapter: Path, base_model: str | None = None) -> str:
    """Return the base model of an adapter: the absolute path of its folder, which holds from anywhere, or a Hub id.

    It is `base_model` (folder or Hub id) if given, else what `config`, which lies in the folder `adapter`, names.
    A relative path there is looked for in the current folder, in the adapter's, and in every folder above that:
    training ran in one of them, most likely. From the Hub only the model's configuration is fetched.

    Raises:
        IVONError: no base model is named, or there is none of that name; the message says where it was looked for.
    """
    name = base_model or config.get("base_model_name_or_path")
    fix = param_ref("base_model")
    if not name or not isinstance(name, str):
        raise IVONError(f"{adapter}: {CONFIG_FILE} names no base model; name it with {fix}")
    if folder := base_model_folder(name, None if base_model else adapter):
        return str(folder)
    places = "" if Path(name).is_absolute() else " here" if base_model else f" here, in {adapter} or above it"
    reason = f"no folder {name} with a {MODEL_CONFIG_FILE}{places}"
    if re.fullmatch(rf"{_HUB_NAME}(/{_HUB_NAME})?", name):
        from huggingface_hub import hf_hub_download

        try:
            hf_hub_download(name, MODEL_CONFIG_FILE)
            return name
        except Exception as error:  # the client raises a dozen kinds, requests' and httpx' among them
            reason += f", and not found on the Hub ({type(error).__name__})"
    raise IVONError(f"the base model {name} cannot be loaded ({reason}); name another with {fix}")


def base_model_folder(name: str, adapter: Path | None = None) -> Path | None:
    """Return the absolute path of the folder of the base model that an adapter calls `name`, or None."""
    near = Path(os.path.abspath(adapter)) if adapter else None
    for place in (Path.cwd(), *([near, *near.parents] if near else [])):
        if (place / name / MODEL_CONFIG_FILE).is_file():
            return Path(os.path.abspath(place / name))
    return None


def moved_config(config: dict[str, Any], source: Path | None, target: Path) -> dict[str, Any]:
    """Return an adapter's configuration for another folder.

    A relative path of the base model that cannot be found from there becomes absolute.
    """
    name = config.get("base_model_name_or_path")
    if not isinstance(name, str) or not name or Path(name).is_absolute():
        return config
    folder = base_model_folder(name, source)
    if folder is None or base_model_folder(name, target) == folder:
        return config
    return {**config, "base_model_name_or_path": str(folder)}


# What a model is loaded and saved in, as torch and users call it.
DTYPES = ("float32", "bfloat16", "float16")


def check_dtype(dtype: str, *others: str) -> None:
    """Raise IVONError if a dtype is neither one of `DTYPES` nor of `others`."""
    if dtype not in (*others, *DTYPES):
        known = ", ".join([*others, *DTYPES])
        raise IVONError(f"{param_ref('dtype')} {dtype!r} is unknown; choose one of {known}")


def read_json(path: Path) -> dict[str, Any]:
    """Return the JSON object in `path`.

    Raises:
        IVONError: it is missing, too large, or not a JSON object of finite numbers.
    """
    try:
        if not (size := regular_size(path)):
            raise IVONError(f"{path} is not valid JSON (it is empty)")
        if size > _JSON_LIMIT:
            raise IVONError(f"{path} is larger than {_JSON_LIMIT >> 20} MiB; it is not a configuration")
        value = json.loads(path.read_text(encoding="utf-8"), parse_float=_finite, parse_constant=_finite)
    except FileNotFoundError as error:
        fix = f"; {_instead(path.parent)}" if path.name == CONFIG_FILE else ""
        raise IVONError(f"{path.parent} has no {path.name}{fix}") from error
    except OSError as error:
        raise IVONError(f"{path} cannot be read ({error.strerror})") from error
    except (ValueError, RecursionError) as error:
        raise IVONError(f"{path} is not valid JSON ({one_line(error)})") from error
    if not isinstance(value, dict):
        raise IVONError(f"{path} does not hold a JSON object")
    return value


def read_lines(path: str | Path, name: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield (`FILE:LINE`, object) for every line of a JSONL file (UTF-8, with or without a byte-order mark).

    Empty lines are skipped.

    `name` is the parameter that gave the path, for messages.

    Raises:
        IVONError: the file cannot be read or holds no line, or a line is not a JSON object.
    """
    held = f"{param_ref(name)} {path}"
    empty = True
    try:
        with open(path, encoding="utf-8-sig") as file:
            for number, line in enumerate(file, start=1):
                if not line.strip():
                    continue
                try:
                    record = json.loads(line)
                except (ValueError, RecursionError) as error:
                    raise IVONError(f"{path}:{number}: not JSON ({error}); each line must be one JSON object") from None
                if not isinstance(record, dict):
                    raise IVONError(f"{path}:{number}: not a JSON object; each line must be one, as in JSONL")
                empty = False
                yield f"{path}:{number}", record
    except OSError as error:
        reason = "there is no such file" if isinstance(error, FileNotFoundError) else error.strerror
        raise IVONError(f"{held}: cannot be read ({reason}); give a JSONL file") from None
    except UnicodeDecodeError as error:
        raise IVONError(f"{held}: not UTF-8 text ({error.reason} at byte {error.start}); give a JSONL file") from None
    if empty:
        raise IVONError(f"{held}: the file is empty; give a JSONL file, one object a line")


def natural_order(name: str) -> list[int | str]:
    """Return a key that sorts names with numbers as people do: checkpoint-2 before checkpoint-10."""
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", name)]


def _instead(folder: Path) -> str:
    """Return what to give in place of a folder that is no adapter."""
    adapters = (path.parent for path in folder.glob(f"*/{CONFIG_FILE}"))
    inside = sorted(adapters, key=lambda path: natural_order(path.name))
    if inside:
        kind = "is an ensemble of" if (folder / ENSEMBLE_FILE).is_file() else "holds"
        shown = [str(path) for path in ([*inside[:2], "…", inside[-1]] if len(inside) > 3 else inside)]
        return f"it {kind} {len(inside)} adapters: give one of them, {', '.join(shown)}"
    if (folder / MODEL_CONFIG_FILE).is_file():
        return "it is a model and no adapter; give the folder of a PEFT adapter"
    return "give the folder of a PEFT adapter"


def _finite(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(f"{text} is no number")
    return number


def header_number(header: Mapping[str, str], name: str) -> float | None:
    """Return a value of the header as a number; None if it is missing or no finite number."""
    try:
        return _finite(header[name])
    except (KeyError, ValueError):
        return None


def regular_size(path: Path) -> int:
    """Return the size of a regular file; a pipe or a device, which has no end, is refused."""
    status = path.stat()
    if not stat.S_ISREG(status.st_mode):
        raise IVONError(f"{path} is not a regular file")
    return status.st_size


def file_names(paths: Sequence[str]) -> dict[str, str]:
    """Return a short name for each path: the file's, after as many of its folders as tell it from the others."""
    parts = {path: PurePath(path).parts for path in paths}
    names = {}
    for path, own in parts.items():
        tails = (own[-length:] for length in range(1, len(own) + 1))
        alone = (tail for tail in tails if [other[-len(tail) :] for other in parts.values()].count(tail) == 1)
        names[path] = next((str(PurePath(*tail)) for tail in alone), path)
    return names


def write_json(path: Path, value: Any) -> None:
    """Write `value` as indented JSON."""
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def copy_companions(source: Path, target: Path, names: Iterable[str] = COMPANIONS) -> None:
    """Copy the model card and the tokenizer that lie beside the adapter in `source`, where there are any; unread.

    A link that leads out of the folder is not followed, unless to the blobs of the Hub's cache: what it names need not
    be the adapter's.
    """
    here = source.resolve()
    allowed = {here, here.parent.parent / "blobs"}
    for path in (source / name for name in names):
        # A file of size 0 is left out: in /proc it can be endless.
        if path.is_file() and path.stat().st_size and allowed & set(path.resolve().parents):
            shutil.copyfile(path, target / path.name)
