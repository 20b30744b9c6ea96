"""Every bad input that a user can give: status 1, one line that names it, nothing written."""

from __future__ import annotations

import json
import math
import pickle
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

MEAN_FILE = "adapter_model.safetensors"
SIGMA_FILE = "ivon_sigma.safetensors"


def header(folder: Path) -> dict[str, str]:
    with safe_open(folder / SIGMA_FILE, "pt") as file:
        return file.metadata()


def change_sigma(change: Callable[[dict[str, torch.Tensor]], object], **facts: str) -> Callable[[Path], None]:
    """A damage to σ alone: `change` gets its tensors, `facts` its header."""

    def damage(folder: Path) -> None:
        tensors = load_file(folder / SIGMA_FILE)
        change(tensors)
        save_file(tensors, folder / SIGMA_FILE, {**header(folder), **facts})

    return damage


def fill(value: float) -> Callable[[dict[str, torch.Tensor]], object]:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors[min(tensors)][0, 0] = value

    return change


def change_mean(folder: Path) -> None:
    tensors = load_file(folder / MEAN_FILE)
    tensors[min(tensors)][0, 0] += 1
    save_file(tensors, folder / MEAN_FILE, {"format": "pt"})


def nan_in_mean(folder: Path) -> None:
    tensors = load_file(folder / MEAN_FILE)
    tensors[min(tensors)][0, 0] = math.nan
    save_file(tensors, folder / MEAN_FILE, {"format": "pt"})


def truncate(name: str, size: int) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        with (folder / name).open("r+b") as file:
            file.truncate(size)

    return damage


def only_pickle(folder: Path) -> None:
    torch.save(load_file(folder / MEAN_FILE), folder / "adapter_model.bin")
    (folder / MEAN_FILE).unlink()


def write(name: str, data: bytes) -> Callable[[Path], None]:
    return lambda folder: (folder / name).write_bytes(data) and None


def remove(name: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).unlink()


class Evil:
    def __reduce__(self) -> tuple:
        return (Path.touch, (Path("evil"),))


HUGE = (2**60).to_bytes(8, "little") + b"{}"
OVERLAP = json.dumps({"a": {"dtype": "F32", "shape": [2**40], "data_offsets": [0, 8]}}).encode()

# What is done to the folder, and what the message says.
FOLDERS: dict[str, tuple[Callable[[Path], None], str]] = {
    "no configuration": (remove("adapter_config.json"), "has no adapter_config.json"),
    "configuration is no JSON": (write("adapter_config.json", b"{"), "adapter_config.json is not valid JSON"),
    "configuration is no object": (write("adapter_config.json", b"[]"), "does not hold a JSON object"),
    "configuration is no text": (write("adapter_config.json", b"\xff\xfe"), "is not valid JSON"),
    "no safetensors": (remove(MEAN_FILE), f"has no {MEAN_FILE}"),
    "pickle instead of safetensors": (only_pickle, "as a pickle, which is never read; convert it"),
    "pickle under its name": (write(MEAN_FILE, pickle.dumps(Evil())), f"{MEAN_FILE} is not a complete safetensors"),
    "no sigma": (remove(SIGMA_FILE), f"has no {SIGMA_FILE}, so it is no posterior"),
    "sigma is a pickle": (write(SIGMA_FILE, pickle.dumps(Evil())), f"{SIGMA_FILE} is not a complete safetensors"),
    "sigma is empty": (write(SIGMA_FILE, b""), f"{SIGMA_FILE} is not a complete safetensors"),
    "truncated mean": (truncate(MEAN_FILE, 3000), f"{MEAN_FILE} is not a complete safetensors"),
    "truncated sigma": (truncate(SIGMA_FILE, 3000), f"{SIGMA_FILE} is not a complete safetensors"),
    "truncated header": (truncate(SIGMA_FILE, 100), f"{SIGMA_FILE} is not a complete safetensors"),
    "huge header": (write(SIGMA_FILE, HUGE), f"{SIGMA_FILE} is not a complete safetensors"),
    "shape beyond the file": (
        write(SIGMA_FILE, len(OVERLAP).to_bytes(8, "little") + OVERLAP + bytes(8)),
        f"{SIGMA_FILE} is not a complete safetensors",
    ),
    "sigma of other shape": (
        change_sigma(lambda t: t.update({min(t): torch.ones(3, 3)})),
        "q_proj.lora_A.weight has shape [3, 3]; the mean has [4, 32]",
    ),
    "sigma of other dtype": (
        change_sigma(lambda t: t.update({min(t): t[min(t)].double()})),
        "has dtype F64; it must be F32",
    ),
    "missing key": (change_sigma(lambda t: t.pop(min(t))), "no σ for base_model"),
    "extra key": (change_sigma(lambda t: t.update({"../x": torch.ones(1)})), "σ for ../x, which"),
    "NaN sigma": (change_sigma(fill(math.nan)), "holds NaN or infinite values"),
    "infinite sigma": (change_sigma(fill(math.inf)), "holds NaN or infinite values"),
    "negative sigma": (change_sigma(fill(-0.1)), "has negative values"),
    "sigma beside another mean": (change_mean, "belongs to another adapter_model.safetensors"),
    "NaN mean": (nan_in_mean, f"{MEAN_FILE}: base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight holds NaN"),
    "not our file": (change_sigma(dict, format="other"), "format is 'other'"),
    "newer format": (change_sigma(dict, format_version="2"), "format_version is '2'"),
    "tau is no number": (change_sigma(dict, tau="warm"), "tau is 'warm'"),
    "tau is 0 in the header": (change_sigma(dict, tau="0"), "tau is '0'"),
    "ratio is no ratio": (change_sigma(dict, pruned_ratio="7"), "pruned_ratio is '7'"),
}

COMMANDS: dict[str, tuple[object, ...]] = {
    "prune": ("prune", "ADAPTER"),
    "temper": ("temper", "ADAPTER", "--tau", 2),
    "sample": ("sample", "ADAPTER", "-n", 1),
    "combine": ("combine", "GOOD", "ADAPTER"),
    "diff": ("diff", "GOOD", "ADAPTER"),
    "info": ("info", "ADAPTER"),
    "merge": ("merge", "ADAPTER", "--prune-ratio", 0.1),
}


@pytest.mark.parametrize(
    ("command", "damage"),
    # `info` describes an adapter without σ; every other pair is an error.
    [(command, damage) for command in COMMANDS for damage in FOLDERS if (command, damage) != ("info", "no sigma")],
)
def test_damaged_folders(
    command: str, damage: str, tiny_adapter: Path, copied: Callable, ivon_post, monkeypatch: pytest.MonkeyPatch
):
    break_it, message = FOLDERS[damage]
    good, bad = copied(tiny_adapter, "good"), copied(tiny_adapter)
    break_it(bad)
    monkeypatch.chdir(bad.parent)
    assert message in ivon_post.error(*({"ADAPTER": bad, "GOOD": good}.get(x, x) for x in COMMANDS[command]))
    assert {path.name for path in bad.parent.iterdir()} == {"good", "adapter"}


ARGUMENTS: dict[str, tuple[tuple[object, ...], str]] = {
    "missing folder": (("prune", "missing"), "missing: no such folder"),
    "a file": (("prune", f"adapter/{MEAN_FILE}"), "is a file; give the adapter's folder"),
    "ratio above 1": (("prune", "adapter", "--ratio", 1.1), "ratio 1.1 is outside [0, 1]"),
    "ratio below 0": (("prune", "adapter", "--ratio", -0.1), "ratio -0.1 is outside [0, 1]"),
    "ratio is NaN": (("prune", "adapter", "--ratio", "nan"), "ratio nan is outside [0, 1]"),
    "tau is 0": (("temper", "adapter", "--tau", 0), "tau 0.0 is not > 0"),
    "tau is negative": (("temper", "adapter", "--tau", -2), "tau -2.0 is not > 0"),
    "tau is NaN": (("temper", "adapter", "--tau", "nan"), "tau nan is not > 0"),
    "tau too small": (("temper", "adapter", "--tau", "1e-300"), "makes σ of"),
    "no tau": (("temper", "adapter"), "no temperature"),
    "tau of a draw": (("sample", "adapter", "--tau", 0), "tau 0.0 is not > 0"),
    "ratio of a draw": (("sample", "adapter", "--prune-ratio", 2), "ratio 2.0 is outside"),
    "no members": (("sample", "adapter", "-n", 0), "0 members make no ensemble"),
    "unknown criterion": (("prune", "adapter", "--criterion", "best"), "criterion 'best' is unknown; choose one of"),
    "unknown criterion of info": (("info", "adapter", "--criterion", "best"), "criterion 'best' is unknown"),
    "target exists": (("prune", "adapter", "-o", "there"), "there exists; choose another name"),
    "target is a file": (("prune", "adapter", "-o", "file", "--overwrite"), "file is not a folder"),
    "target is something else": (("prune", "adapter", "-o", "home", "--overwrite"), "holds something other"),
    "target is the input": (("prune", "adapter", "-o", "adapter", "--overwrite"), "never modified"),
    "target holds the input": (("sample", "adapter", "-o", ".", "--overwrite"), "never modified"),
    "target cannot be written": (("temper", "adapter", "--tau", 2, "-o", "file/x"), "file/x cannot be written"),
    "target in no file system": (("sample", "adapter", "-n", 1, "-o", "/proc/x"), "/proc/x cannot be written"),
    "one posterior": (("combine", "adapter"), "1 posterior cannot be combined"),
    "weights for precision": (("combine", "adapter", "adapter", "--weights", "1,1"), "for the methods linear and cat"),
    "too few weights": (("combine", "adapter", "adapter", "--method", "linear", "--weights", "1"), "do not fit 2"),
    "missing recommendation": (("prune", "adapter", "--recommended", "none.json"), "none.json"),
    "no base model": (("merge", "adapter", "--base-model", "./none"), "cannot be loaded"),
}


@pytest.mark.parametrize("case", ARGUMENTS)
def test_bad_arguments(
    case: str, tiny_adapter: Path, copied: Callable, ivon_post, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    arguments, message = ARGUMENTS[case]
    copied(tiny_adapter)
    copied(tiny_adapter, "there")
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "thesis.tex").write_text("precious")
    (tmp_path / "file").write_text("precious")
    monkeypatch.chdir(tmp_path)

    def everything() -> dict[Path, bytes | None]:
        return {path: path.read_bytes() if path.is_file() else None for path in tmp_path.rglob("*")}

    before = everything()
    assert message in ivon_post.error(*arguments)
    assert everything() == before


def test_evil_pickles_were_never_run():
    assert not Path("evil").exists()
