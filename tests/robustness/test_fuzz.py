"""Every file of an adapter folder and of an ensemble, damaged at random: a right result, or one line and status 1.

A case is a number: it decides what is damaged, how, and which command runs on it, so `IVON_FUZZ_CASE=123` repeats one.
With IVON_LONG=1 there are 24,000 of them, a few hundred without.
"""

from __future__ import annotations

import contextlib
import functools
import json
import math
import operator
import os
import random
import re
import resource
import shutil
import signal
import struct
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from command_line import READING, WRITING, fill, process, snapshot
from safetensors.numpy import load_file, save_file

from axolotl_ivon.posterior import tensors as posterior_tensors
from axolotl_ivon.posterior.posterior import Posterior
from axolotl_ivon.posterior.tensors import Tensors, fingerprint, sha256
from axolotl_ivon.storage import atomic, tensorfile
from axolotl_ivon.storage.tensorfile import TensorFile

LONG = os.environ.get("IVON_LONG") == "1"
CASES = 24_000 if LONG else 300
MERGES = 400 if LONG else 12
SECONDS = 5
MIB = 2**20

CONFIG, MEAN, SIGMA = "adapter_config.json", "adapter_model.safetensors", "ivon_sigma.safetensors"
ENSEMBLE, RECOMMENDED = "ensemble.json", "recommended.json"

KEYS = ("", "..", "../../evil", "/etc/passwd", "a\nb", "\x1b[31m", "a\0b", "x" * 5000, "__metadata__", "é\u202eb", "%s")
NUMBERS = ("0", "-1", "1e999", "-1e999", "NaN", "Infinity", "-Infinity", "1e-400", "0.5", "9" * 400, "9" * 5000)
VALUES = (
    *NUMBERS,
    *(str(2**power) for power in (31, 32, 53, 63, 64)),
    *("null", "true", "[]", "{}", '""', '"\\ud800"', '"\\u0000"', '"\\u001b[2J\\nline"'),
    *('"../../evil"', '"/etc/passwd"', '"' + "x" * 5_000 + '"', "[" * 1000 + "]" * 1000, "[" * 100_000 + "]" * 100_000),
    '{"a":' * 5000 + "1" + "}" * 5000,
    "[[0, 1], [2]]",
    '["a", 1, null]',
)
DTYPES = ("F64", "F32", "F16", "BF16", "I64", "I32", "I8", "U8", "BOOL", "F8_E4M3", "U64", "C64", "F4", "f32", "")
FACTS = ("nan", "inf", "-inf", "0", "-0.0", "1e400", "1e-400", "1_0", "7", "٣", "", "9" * 5000, "a\nb", "\x1b[2J")


def flipped(data: bytes, rng: random.Random) -> bytes:
    """Bytes changed, inserted, removed, repeated, cut off or added."""
    data = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 8))):
        at = rng.randrange(len(data) + 1)
        length = rng.choice((1, 2, 8, 64, 4096))
        kind = rng.randrange(6)
        if kind == 0 and data:
            data[at % len(data)] ^= 1 << rng.randrange(8)
        elif kind == 1:
            data[at : at + length] = rng.randbytes(length)
        elif kind == 2:
            data[at:at] = rng.randbytes(length)
        elif kind == 3:
            del data[at : at + length]
        elif kind == 4:
            data[at:at] = data[at : at + length]
        else:
            del data[at:]
    return bytes(data)


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Every place inside a JSON value."""
    yield path
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        yield from places(inner, (*path, key))


def changed_json(text: bytes, rng: random.Random) -> bytes:
    """A JSON text with a value that does not belong there, a key renamed, doubled or gone, or wrapped in rubbish."""
    value = json.loads(text)
    path = rng.choice(list(places(value))[1:] or [()])
    kind = rng.randrange(8)
    if kind == 0 or not path:
        return rng.choice((b"", b"\xef\xbb\xbf" + text, text.decode().encode("utf-16"), text + b"x", b"null", b"[]"))
    holder = functools.reduce(operator.getitem, path[:-1], value)
    mark = f"mark-{rng.random()}"
    if kind == 1 and isinstance(holder, dict):
        holder[rng.choice(KEYS)] = holder.pop(path[-1])
        return json.dumps(value).encode()
    if kind == 2:
        del holder[path[-1]]
        return json.dumps(value).encode()
    new = rng.choice(VALUES)
    if kind == 3 and isinstance(holder, dict):
        doubled = f"{json.dumps(path[-1])}: {new}, {json.dumps(path[-1])}: {json.dumps(holder[path[-1]])}"
        holder[mark] = None
        return json.dumps(value).replace(f'"{mark}": null', doubled).encode()
    holder[path[-1]] = mark
    return json.dumps(value).replace(f'"{mark}"', new).encode()


def split(data: bytes) -> tuple[dict[str, Any], bytes]:
    """The header and the tensors of a safetensors file."""
    size = int.from_bytes(data[:8], "little")
    return json.loads(data[8 : 8 + size]), data[8 + size :]


def joined(header: bytes, tensors: bytes) -> bytes:
    return len(header).to_bytes(8, "little") + header + tensors


def changed_header(data: bytes, rng: random.Random) -> bytes:
    """A safetensors file whose header lies: about lengths, dtypes, shapes, offsets, names or facts."""
    header, tensors = split(data)
    key = rng.choice([name for name in header if name != "__metadata__"])
    entry = header[key]
    kind = rng.randrange(9)
    if kind == 0:
        size = rng.choice((0, 1, 7, len(data), len(data) - 8, 2**27, 2**31, 2**63, 2**64 - 1, rng.randrange(len(data))))
        return struct.pack("<Q", size) + data[8:]
    if kind == 1:
        entry["dtype"] = rng.choice(DTYPES)
    elif kind == 2:
        sizes = (0, 1, -1, 2**31, 2**32, 2**62, 2**63, 2**64, 10**30, 0.5, "4", None, [4])
        entry["shape"] = rng.choice(([], [0, 2**62], [2**33, 2**33, 0], [1] * 40, [1] * 70, [2**63 + 4], [-4, -32]))
        if rng.random() < 0.5:
            entry["shape"] = [*split(data)[0][key]["shape"]]
            entry["shape"][rng.randrange(len(entry["shape"]))] = rng.choice(sizes)
    elif kind == 3:
        entry["data_offsets"][rng.randrange(2)] += rng.choice((-1, 1, 4, -4, 2**40, 2**63, -(10**9)))
    elif kind == 4:
        header[rng.choice(KEYS)] = header.pop(key)
    elif kind == 5:
        del header[key]
    elif kind == 6:
        facts = header.setdefault("__metadata__", {})
        facts[rng.choice(("tau", "pruned_ratio", "ess", "new", "a\nb"))] = rng.choice(FACTS)
    elif kind == 7:
        return joined(changed_json(json.dumps(header).encode(), rng), tensors)
    else:
        text = json.dumps(header)
        return joined((text[:-1] + f", {json.dumps(key)}: {json.dumps(entry)}}}").encode(), tensors)
    return joined(json.dumps(header).encode(), tensors)


def consistent(folder: Path) -> None:
    """Put the fingerprint of the mean as it is now into σ, so that what lies behind that check is reached too."""
    if not all((folder / name).is_file() and (folder / name).stat().st_size for name in (MEAN, SIGMA)):
        return
    with contextlib.suppress(Exception):  # the files may be beyond that
        mean = Tensors.of_file(TensorFile(folder / MEAN))
        header, tensors = split((folder / SIGMA).read_bytes())
        header["__metadata__"]["mean_sha256"] = fingerprint(mean, {key: sha256(mean.raw(key)) for key in mean})
        (folder / SIGMA).write_bytes(joined(json.dumps(header).encode(), tensors))


def odd_pair(folder: Path, rng: random.Random) -> None:
    """A mean and a σ that belong together, with unusual names, shapes, dtypes and values."""
    mean, sigma = {}, {}
    extremes = [0.0, -0.0, 1e-45, 1e-38, 3e38, -3e38, 1.0]
    for _ in range(rng.choice((0, 1, 3))):
        key = rng.choice((*KEYS, "base_model.model.a.lora_A.weight", "a.0", "a.00", "1", "a²"))
        if key == "__metadata__":
            continue
        shape = rng.choice(((), (0,), (1,), (3, 0, 2), (5,), (4, 4), (1,) * 30))
        dtype = rng.choice((np.float64, np.float32, np.float16, np.int64, np.int8, np.bool_))
        values = [rng.choice((*extremes, math.nan, math.inf, rng.gauss(0, 1))) for _ in range(math.prod(shape))]
        with np.errstate(all="ignore"):
            mean[key] = np.array(values, np.float64).reshape(shape).astype(dtype)
        bad = (math.nan, math.inf, -1.0) if rng.random() < 0.2 else ()
        values = [abs(rng.choice((*extremes, rng.random()))) for _ in range(math.prod(shape))]
        sigma[key] = np.array([rng.choice((v, *bad)) for v in values], np.float32).reshape(shape)
    save_file(mean, folder / MEAN, {"format": "pt"})
    save_file(sigma, folder / SIGMA, split((folder / SIGMA).read_bytes())[0]["__metadata__"])
    consistent(folder)


def replaced(path: Path, rng: random.Random) -> None:
    """Something other than a file in a file's place."""
    data = path.read_bytes()
    path.unlink()
    kind = rng.randrange(8)
    if kind == 0:
        path.mkdir()
    elif kind == 1:
        os.mkfifo(path)
    elif kind == 2:
        devices = "/dev/zero /dev/full /dev/null /dev/stdin /proc/self/mem /proc/kmsg"
        path.symlink_to(rng.choice(devices.split()))
    elif kind <= 5:
        path.symlink_to({3: path.name, 4: "../../nowhere", 5: ".."}[kind])
    elif kind == 6:  # as the Hub's cache has it
        blob = path.with_name(path.name + ".blob")
        blob.write_bytes(data)
        path.symlink_to(blob.name)


def damage(folder: Path, rng: random.Random) -> None:
    """Damage one file, or two."""
    kind = rng.randrange(10)
    if kind == 0:
        odd_pair(folder, rng)
        return
    for _ in range(rng.choice((1, 1, 1, 2))):
        path = rng.choice([p for p in sorted(folder.rglob("*")) if p.is_file() and not p.is_symlink()] or [None])
        if path is None:
            return
        if kind == 1:
            replaced(path, rng)
        elif kind <= 3:
            path.write_bytes(flipped(path.read_bytes(), rng))
        else:
            with contextlib.suppress(ValueError, IndexError, KeyError, TypeError, AttributeError, RecursionError):
                # Where it was damaged before, it stays as it is.
                change = changed_header if path.suffix == ".safetensors" else changed_json
                path.write_bytes(change(path.read_bytes(), rng))
    if rng.random() < 0.7:
        consistent(folder)


COMMANDS = (
    "info ADAPTER --json",
    "info ADAPTER",
    "check ADAPTER --json",
    "check ADAPTER",
    "prune ADAPTER -o OUT --ratio 0.3 --json",
    "prune ADAPTER -o OUT --criterion random",
    "temper ADAPTER -o OUT --tau 4",
    "sample ADAPTER -o OUT -n 2",
    f"sample ADAPTER -o OUT -n 1 --recommended ADAPTER/{RECOMMENDED}",
    "combine ADAPTER GOOD -o OUT",
    "combine GOOD ADAPTER -o OUT --method linear",
    "combine ADAPTER GOOD -o OUT --method cat",
    "diff ADAPTER GOOD --json",
    "diff GOOD ADAPTER",
)


def check_result(command: str, folder: Path, out: Path, stdout: str) -> None:
    facts = json.loads(stdout) if command.endswith("--json") else {}
    specs = {key: shape for key, (_, shape) in TensorFile(folder / MEAN).specs.items()}
    match command.split()[0]:
        case "temper":
            before, after = load_file(folder / SIGMA), load_file(out / SIGMA)
            assert before.keys() == after.keys()
            for key in before:
                assert np.array_equal(after[key], (before[key] / np.sqrt(np.float32(4))).astype(np.float32))
            Posterior.from_pretrained(out)
        case "prune":
            q = Posterior.from_pretrained(out)
            if facts:
                assert (facts["pruned"], facts["weights"]) == (sum(q.pruned().values()), q.mean.weights)
        case "sample":
            members = [path.name for path in sorted(out.iterdir()) if path.name != ENSEMBLE]
            assert json.loads((out / ENSEMBLE).read_text())["members"] == members
            assert members == [f"sample-{i:04d}" for i in range(2 if "-n 2" in command else 1)]
            for name in members:
                assert {k: shape for k, (_, shape) in TensorFile(out / name / MEAN).specs.items()} == specs
        case "info" if facts:
            assert facts["weights"] == sum(map(math.prod, specs.values()))
        case "check" if facts:
            assert all("\n" not in one["text"] for one in facts["findings"])
            assert facts["log_sigma_spread"] is None or facts["log_sigma_spread"] >= 0


class TooLong(BaseException):
    """Nobody catches it."""


@contextlib.contextmanager
def at_most(seconds: float) -> Iterator[None]:
    def too_long(*_: object) -> None:
        raise TooLong

    before = signal.signal(signal.SIGALRM, too_long)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


class Serial(contextlib.AbstractContextManager["Serial"]):
    """A pool of threads without threads, which take longer to start than a case takes."""

    map = staticmethod(map)

    def __init__(self, *_: object) -> None:
        pass

    __exit__ = shutdown = __init__


@pytest.fixture
def template(tiny_adapter: Path, tmp_path: Path) -> Iterator[Path]:
    """A folder with what a case starts from: an adapter that is an ensemble too, a good adapter, things outside."""
    memory = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=memory if os.access(memory, os.W_OK) else tmp_path) as place:
        folder = Path(place) / "template"
        files = (CONFIG, MEAN, SIGMA, "README.md", "tokenizer.json", "tokenizer_config.json")
        for name, chosen in {"adapter": files, "good": files, "adapter/sample-0000": (CONFIG, MEAN)}.items():
            (folder / name).mkdir(parents=True)
            for file in chosen:
                shutil.copy(tiny_adapter / file, folder / name / file)
        ensemble = {"source": "x", "seed": 0, "tau": 1.0, "pruned_ratio": 0.0}
        ensemble |= {"members": ["sample-0000", "/etc", "../outside"]}
        (folder / "adapter" / ENSEMBLE).write_text(json.dumps(ensemble))
        (folder / "adapter" / RECOMMENDED).write_text('{"tau": 2.0, "ratio": 0.1, "seed": 0}')
        (folder / "outside").mkdir()
        (folder / "outside" / "canary").write_text("precious")
        yield folder


# What precedes the error where the adapter's own recommendation was read before the damage.
TAKEN = re.compile(r"^(taken from the adapter's|the adapter's) recommended\.json[^\n]*\n")


def one_case(number: int, template: Path, place: Path, ivon_post: Any, commands: Sequence[str]) -> int:
    """Run a case, and return how many bytes its files have."""
    rng = random.Random(number)
    if place.exists():
        shutil.rmtree(place)
    shutil.copytree(template, place)
    adapter, out = place / "adapter", place / "out"
    damage(adapter, rng)
    command = rng.choice(commands)
    target = adapter / "sample-0000" if rng.random() < 0.05 else adapter
    names = {"ADAPTER": target, "GOOD": place / "good", "OUT": out}
    arguments = [names.get(word, word.replace("ADAPTER/", f"{adapter}/")) for word in command.split()]
    before = snapshot(place)
    with at_most(SECONDS):
        result = ivon_post.run(*arguments)
    said = f"case {number}: {' '.join(map(str, arguments))}\n{result.output[-2000:]}"
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise AssertionError(said) from result.exception
    after = {name: kind for name, kind in snapshot(place).items() if name != "out" and not name.startswith("out/")}
    assert after == before, said
    if result.exit_code:
        assert (result.exit_code, result.stdout, out.exists()) == (1, "", False), said
        message = TAKEN.sub("", result.stderr)
        assert message.startswith("Error: "), said
        assert message.endswith("\n"), said
        assert message[:-1].isprintable(), said
        assert len(message) < 20_000, said
    else:
        assert out.exists() == ("OUT" in command), said
        check_result(command, target, out, result.stdout)
    return sum(path.lstat().st_size for path in adapter.rglob("*"))


def peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def run_cases(
    count: int, seed: int, template: Path, ivon_post: Any, commands: Sequence[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(atomic, "_sync", lambda path: None)  # nobody pulls the plug here
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)
    for module in (tensorfile, posterior_tensors):
        monkeypatch.setattr(module, "ThreadPoolExecutor", Serial)
    monkeypatch.chdir(template)
    place = template.parent / "case"
    if only := os.environ.get("IVON_FUZZ_CASE"):
        one_case(int(only), template, place, ivon_post, commands)
        return
    before = largest = 0
    for i in range(count):
        largest = max(largest, one_case(seed + i, template, place, ivon_post, commands))
        if i == count // 10:
            before = peak()
    assert peak() - before <= 2 * largest + 64 * MIB


@pytest.mark.filterwarnings("error::RuntimeWarning")  # numpy's, of values that it could not represent
def test_a_damaged_file_is_right_or_one_line(template: Path, ivon_post: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    run_cases(CASES, 0, template, ivon_post, COMMANDS, monkeypatch)


def test_merging_damaged_adapters(template: Path, ivon_post: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    run_cases(MERGES, 10**6, template, ivon_post, ["merge ADAPTER -o OUT"], monkeypatch)


MEASURE = """
import resource, sys
import numpy, safetensors, rich.table, ivon_post
from axolotl_ivon.inspect import diagnosis, diff, info
from axolotl_ivon.posterior import sample
def peak(): return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
before = peak()
try: ivon_post.cli(sys.argv[1:])
except SystemExit as end: assert not end.code
print(peak() - before, file=sys.stderr)
"""
ALL = READING | {name: words for name, words in WRITING.items() if name != "merge"}


@pytest.mark.parametrize("command", ALL)
def test_memory_is_at_most_twice_what_is_read(command: str, tiny_adapter: Path, tmp_path: Path) -> None:
    folder = tmp_path / "adapter"  # of eight tensors of 4 MiB
    folder.mkdir()
    shutil.copy(tiny_adapter / CONFIG, folder / CONFIG)
    header = split((tiny_adapter / SIGMA).read_bytes())[0]["__metadata__"]

    def fill_folder(folder: Path, seed: int) -> None:
        rng = np.random.default_rng(seed)
        mean = {f"layers.{i}.lora_A.weight": rng.normal(size=(1024, 1024)).astype(np.float32) for i in range(8)}
        save_file(mean, folder / MEAN, {"format": "pt"})
        save_file({key: np.abs(value) for key, value in mean.items()}, folder / SIGMA, header)
        consistent(folder)

    fill_folder(folder, seed=0)
    size = sum((folder / name).stat().st_size for name in (MEAN, SIGMA))
    if "OTHER" in ALL[command]:
        fill_folder(Path(shutil.copytree(folder, tmp_path / "other")), seed=1)
    done = process(*fill(ALL[command], "adapter", "other", "out"), program=MEASURE, cwd=tmp_path, check=True)
    assert int(done.stderr.splitlines()[-1]) <= 2 * size + 16 * MIB


def test_code_of_a_model_is_never_run_nor_asked_about(
    tiny_llama: Path, tiny_adapter: Path, copied: Callable, ivon_post: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A base model that brings code of its own: transformers would ask on the terminal whether to run it."""

    def asked(*_: object) -> str:
        raise AssertionError("the user was asked")

    monkeypatch.setattr("builtins.input", asked)
    base, adapter = copied(tiny_llama, "base"), copied(tiny_adapter)
    ran = base.parent / "ran"
    (base / "modeling_evil.py").write_text(f"open({str(ran)!r}, 'w')")
    config = json.loads((base / "config.json").read_text())
    names = {f"Auto{kind}": "modeling_evil.Evil" for kind in ("Config", "Model", "ModelForCausalLM")}
    (base / "config.json").write_text(json.dumps({**config, "model_type": "evil", "auto_map": names}))
    tokenizer = json.loads((adapter / "tokenizer_config.json").read_text())
    tokenizer |= {"tokenizer_class": "Evil", "auto_map": {"AutoTokenizer": ["modeling_evil.Evil", None]}}
    (adapter / "tokenizer_config.json").write_text(json.dumps(tokenizer))
    (adapter / "modeling_evil.py").write_text(f"open({str(ran)!r}, 'w')")
    assert "custom code" in ivon_post.error("merge", adapter, "--base-model", base, "-o", base.parent / "out")
    ivon_post.run("merge", adapter, "-o", base.parent / "out")
    assert not ran.exists()


OFFLINE = """
import json, os, socket, sys
def refuse(*_, **__): raise SystemExit("the network was asked")
socket.socket.connect = socket.socket.connect_ex = socket.getaddrinfo = socket.create_connection = refuse
for name in ("HF_HUB_OFFLINE", "AXOLOTL_DO_NOT_TRACK"): os.environ.pop(name, None)
import ivon_post
for words in json.loads(sys.argv[1]):
    try: ivon_post.cli(words)
    except SystemExit as end: assert not end.code, (words, end.code)
try: ivon_post.cli(["info", "someone/adapter"])
except SystemExit as end: print("asked:", end.code)
"""


def test_no_command_asks_the_network_unless_for_a_hub_id(
    tiny_adapter: Path, other_adapter: Path, copied: Callable
) -> None:
    folder = copied(tiny_adapter)
    copied(other_adapter, "other")
    commands = [fill(words, "adapter", "other", f"{name}-out") for name, words in (READING | WRITING).items()]
    done = process(json.dumps(commands), program=OFFLINE, cwd=folder.parent)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.splitlines()[-1].startswith("asked: ")
