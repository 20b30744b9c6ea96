"""What a user got wrong is told before torch is imported: everything that can be checked without it comes first."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from command_line import process, snapshot
from tiny import build_llama, write_chats

PROGRAM = """
import json, sys
from click.testing import CliRunner
from ivon_post import cli
sys.modules["bert_score"] = None
for words in json.load(sys.stdin):
    result = CliRunner().invoke(cli, words)
    print(json.dumps([result.exit_code, result.stdout, result.stderr, "torch" in sys.modules]))
"""
ONE = '{"messages": [{"role": "user", "content": "?"}, {"role": "assistant", "content": "A"}]}\n'

# Words of a command line -> what the one line on stderr says.
CASES = {
    "eval adapter -d no.jsonl": "--data no.jsonl: cannot be read (there is no such file)",
    "eval home/chosen -d no.jsonl": "--data no.jsonl: cannot be read (there is no such file)",
    "eval adapter -d empty.jsonl": "--data empty.jsonl: the file is empty",
    "eval adapter -d broken.jsonl": "broken.jsonl:1: not JSON",
    "eval adapter -d one.jsonl --task choice": "name the others with --choices A,B",
    "eval adapter -d chats.jsonl -d chats.jsonl": "--data chats.jsonl is given twice",
    "eval adapter -d chats.jsonl --choices A,C": "is not one of --choices A,C",
    "eval adapter -d chats.jsonl --choices A,B,": "give at least two different, non-empty strings",
    "eval adapter -d chats.jsonl --rows mode": "--rows mode: 'mode' is unknown",
    "eval adapter -d chats.jsonl --tau 0": "--tau 0.0 is not > 0",
    "eval adapter -d chats.jsonl --ratio 2": "--ratio 2.0 is outside [0, 1]",
    "eval adapter -d chats.jsonl --recommended no.json": "--recommended cannot be read",
    "eval adapter -d chats.jsonl --recommended other.json": "was chosen for another adapter",
    "eval adapter -d chats.jsonl --task classify": "--task classify: the adapter",
    "eval nowhere -d chats.jsonl": "nowhere: no such folder",
    "eval plain -d chats.jsonl": "there are no draws and no pruning",
    "eval moved -d chats.jsonl": "no folder ../gone with a config.json here, in moved or above it",
    "eval adapter -d chats.jsonl --base-model ./no": "no folder ./no with a config.json here",
    "eval adapter -d chats.jsonl --base-model no/one": "not found on the Hub",
    "sweep adapter -d chats.jsonl --tau 1 --ratio 0": "--tau and --ratio: one point",
    "sweep adapter -d chats.jsonl --tau 0,1": "--tau 0.0 is not > 0",
    "sweep adapter -d chats.jsonl -o one.jsonl": "one.jsonl is not a folder",
    "sweep adapter -d chats.jsonl -o adapter/sweep": "adapter/sweep lies in the input, which is never modified",
    "eval adapter -d chats.jsonl -o adapter/x.jsonl": "lies in the input, which is never modified",
    "eval adapter -d chats.jsonl -o no/x.jsonl": "there is no such folder",
    "eval adapter -d chats.jsonl -o chats.jsonl --overwrite": "--output chats.jsonl is --data itself",
    "eval adapter -d chats.jsonl --ood one.jsonl -o ./one.jsonl --overwrite": "--output one.jsonl is --ood itself",
    "predict adapter -d chats.jsonl -o chats.jsonl --overwrite": "--output chats.jsonl is --data itself",
    "generate adapter -p chats.jsonl -o chats.jsonl --overwrite": "--output chats.jsonl is --prompts itself",
    "eval adapter -d chats.jsonl --ood chats.jsonl": "the same questions as --data chats.jsonl",
    "eval adapter -d chats.jsonl --calibrate no.jsonl": "--calibrate no.jsonl: cannot be read",
    "eval adapter -d chats.jsonl --endpoint http://localhost:9": "adapter is no ensemble",
    "eval adapter -d chats.jsonl --endpoint http://localhost:9 --tau 2": "already; give --tau to `ivon-post",
    "sweep adapter -d chats.jsonl --endpoint http://localhost:9 --ratio 0": "already; give --ratio to",
    "predict adapter -d chats.jsonl --endpoint http://localhost:9 --device cpu": "give --device to the server",
    "report adapter --eval no.json -d chats.jsonl": "leave --data out",
    "report adapter --examples x.jsonl": "--examples x.jsonl: give the --eval that belongs to it too",
    "report adapter -d chats.jsonl --sweep other.json": "--sweep other.json was chosen for another adapter",
    "report adapter -d chats.jsonl -o chats.jsonl --overwrite": "--output chats.jsonl is --data itself",
    "report adapter --eval one.jsonl -o ./one.jsonl --overwrite": "--output one.jsonl is --eval itself",
    "report adapter --eval a --examples one.jsonl -o one.jsonl --overwrite": "--output one.jsonl is --examples itself",
    "report adapter --sweep plain.json -o plain.json --overwrite": "--output plain.json is --sweep itself",
    "report adapter --influence scores.jsonl -o ./scores.jsonl --overwrite": "is --influence itself",
    "card nowhere": "nowhere: no such folder",
    "card adapter --results no.json": "--results cannot be read",
    "card adapter --recommended other.json": "--recommended other.json was chosen for another adapter",
    "generate adapter -p no.jsonl": "--prompts no.jsonl: cannot be read",
    "generate adapter -p chats.jsonl -n 12": "-n 12 is not a multiple of --per-model 8",
    "generate adapter -p chats.jsonl --mean --tau 2": "--mean has no temperature",
    "generate adapter -p chats.jsonl -o no/x.jsonl": "there is no such folder; give a file in a folder that exists",
    "generate adapter -p chats.jsonl -o one.jsonl": "was not made by `ivon-post generate`",
    "generate adapter -p chats.jsonl -o adapter/x.jsonl": "lies in the input, which is never modified",
    "generate moved -p chats.jsonl": "../gone cannot be loaded",
    "generate adapter -p chats.jsonl --endpoint http://localhost:9": "adapter is no ensemble",
    "generate adapter -p chats.jsonl --endpoint http://localhost:9 --tau 2": "the members are drawn already",
    "serve nowhere --port 0": "nowhere: no such folder",
    "serve plain --port 0": "has no ivon_sigma.safetensors",
    "serve adapter --host 0.0.0.0": "--host 0.0.0.0: others can reach it; set a key with IVON_API_KEY",
    "serve adapter --name a:b --port 0": "--name 'a:b': a model's name is not empty and has no ':' in it",
    "serve adapter --port 0 --endpoint http://localhost:9": "adapter is no ensemble",
    "serve adapter --port 0 --endpoint http://localhost:9 --tau 2": "--endpoint: the members are drawn already",
    "serve moved --port 0": "../gone cannot be loaded",
    "influence nowhere -d chats.jsonl": "nowhere: no such folder",
    "influence adapter -d chats.jsonl --on no.jsonl": "--on no.jsonl: cannot be read",
    "influence plain -d chats.jsonl": "plain has no ivon_sigma.safetensors",
    "influence moved -d chats.jsonl -q": "../gone",
    "influence adapter -d chats.jsonl --by on": "--by on: it is the effect on other data; name them with --on",
    "influence adapter -d chats.jsonl --keep 90 -o x": "--keep 90 is outside (0, 1); 0.9 leaves",
    "influence adapter -d chats.jsonl --keep 0.9": "--keep 0.9 writes the rows that stay; name a file for them",
    "influence adapter -d chats.jsonl --keep 0.9 --limit 3 -o x": "needs the scores of every row; leave --limit out",
    "influence adapter -d chats.jsonl --keep 0.9 -o one.jsonl": "--output one.jsonl exists",
    "influence adapter -d chats.jsonl --keep 0.9 --overwrite -o chats.jsonl": "--output chats.jsonl is --data itself",
    "influence adapter -d chats.jsonl --keep 0.9 --scores scores.jsonl --overwrite -o scores.jsonl": "--scores itself",
    "influence adapter -d chats.jsonl --keep 0.9 --scores scores.jsonl -o x": "so they are of other data than --data",
    "influence adapter -d chats.jsonl --scores one.jsonl": "are used only with --keep",
    "influence adapter -d chats.jsonl --scores one.jsonl --keep 0.9 -o x": "it has no `index`",
    "report adapter --influence one.jsonl": "one.jsonl:1: ",
    "fit nowhere -d chats.jsonl": "nowhere: no such folder",
    "fit plain -d chats.jsonl --validation no.jsonl": "--validation no.jsonl: cannot be read",
    "fit plain -d chats.jsonl --ess -1": "--ess -1: give a number > 0",
    "fit plain -d chats.jsonl --ess 9 --validation chats.jsonl": "--ess 9: --validation chooses it",
    "fit plain -d chats.jsonl --tolerance 1": "--tolerance 1.0: it is for --method tfb; leave it out",
    "fit plain -d chats.jsonl --method tfb --empirical": "--empirical: the width of --method tfb is found by",
    "fit plain -d chats.jsonl --prior-strength 0": "--prior-strength 0: give a number > 0",
    "fit moved -d chats.jsonl": "../gone cannot be loaded",
    "check plain": "plain has no ivon_sigma.safetensors",
    "merge nowhere": "nowhere: no such folder",
    "merge adapter --tau 2": "--tau 2: the mean has no temperature",
    "merge adapter --base-model ./no": "name another with --base-model",
    "merge moved": "../gone cannot be loaded",
    "mbr no.jsonl": "FILE no.jsonl: cannot be read",
    "mbr chats.jsonl": "chats.jsonl:1: it has no `outputs`",
    "mbr chats.jsonl -a [": "--answer-regex '[': not a regular expression",
    "prune adapter --ratio 2": "--ratio 2.0 is outside",
    "prune adapter --criterion best": "--criterion 'best' is unknown; choose one of snr, sigma, magnitude, random",
    "temper adapter": "there is no temperature",
    "temper home/chosen": "there is no temperature; give --tau, or --recommended",
    "temper adapter --tau nan": "--tau nan is not > 0",
    "sample adapter -n 0": "0 members make no ensemble",
    "combine adapter": "1 posterior cannot be combined",
    "combine adapter adapter": "adapter and adapter hold the same data",
    "diff adapter nowhere": "nowhere: no such folder",
    "info .": "it holds 3 adapters: give one of them, adapter, moved, plain",
    "eval adapter -d bad.jsonl": "bad.jsonl:1: no assistant message",
    "eval adapter -d chats.jsonl --rows base --calibrate no.jsonl": "have one of them in --rows",
    "eval adapter -d chats.jsonl -o home": "is a folder",
    "sweep adapter -d chats.jsonl --ratio 0,1.5": "--ratio 1.5 is outside",
    "sweep adapter -d chats.jsonl --risk 0.1 --task generate": "--risk 0.1: the task generate scores tokens",
    "sweep adapter -d chats.jsonl --risk 0": "--risk 0 is outside (0, 1); 0.05 is 5 %",
    "sweep adapter -d chats.jsonl --risk 0.1 --confidence 1": "--confidence 1 is outside (0, 1)",
    "sweep --combine adapter -d one.jsonl -d chats.jsonl": "1 posterior cannot be combined",
    "sweep --combine adapter plain -d chats.jsonl": "--data: weights are a trade-off between files",
    "generate adapter -p assistant.jsonl": "assistant.jsonl:1: no user turn",
    "generate adapter -p chats.jsonl --top-p 0": "--top-p 0.0: must be above 0",
    "generate adapter -p chats.jsonl --max-tokens 0": "--max-tokens 0: must be at least 1",
    "fit plain -d rows.jsonl": "no list `messages`",
    "fit plain -d question.jsonl": "no assistant message",
    "influence adapter -d chats.jsonl --scores scores.jsonl --on chats.jsonl --keep 0.9 -o x": "--scores reuses",
    "mbr nbest.jsonl nbest.jsonl": "the label 'nbest' is taken",
    "mbr nbest.jsonl -o -": "--output '-' is not a file name",
    "mbr nbest.jsonl -o home": "already; choose another name with --output",
    "mbr nbest.jsonl -o nbest.jsonl --overwrite": "is not a folder; choose another name with --output",
    "mbr nbest.jsonl -a boxed": "matches none of the 32 outputs",
    "mbr nbest.jsonl --utility bertscore": "pip install bert-score",
    "mbr nbest.jsonl --fields a,,b": "--fields a,,b: give different names",
    "mbr nbest.jsonl --fields a": "--fields a: none of the 32 outputs in nbest.jsonl is JSON",
    "mbr nbest.jsonl --risk 1": "--risk 1 is outside (0, 1)",
    "mbr nbest.jsonl --risk 0.1": "nbest has no .settings.json beside it",
    "mbr nbest.jsonl x=nbest.jsonl --risk 0.1": "--risk: give one FILE",
    "mbr nbest.jsonl --recommended plain.json": "plain.json has no threshold",
    "mbr nbest.jsonl --recommended odd.json": "threshold is 2; it must be less than or equal to 1",
    "mbr nbest.jsonl --recommended odd.json --risk 0.1": "leave one of them out",
    "predict adapter -d no.jsonl": "--data no.jsonl: cannot be read (there is no such file)",
    "predict adapter -d assistant.jsonl": "assistant.jsonl:1: no user turn with a text",
    "predict adapter -d question.jsonl": "name the labels with --choices A,B",
    "predict adapter -d question.jsonl --choices A,B --threshold 2": "--threshold 2 is outside [0, 1]",
    "predict adapter -d question.jsonl --choices A,B --set 0.9": "run `ivon-post sweep --coverage 0.9`",
    "sweep adapter -d chats.jsonl --coverage 1": "--coverage 1 is outside (0, 1)",
    "predict adapter -d question.jsonl --choices A,B -o adapter/x": "lies in the input",
    "predict adapter -d question.jsonl --choices A,B -o gone/x": "--output gone/x: there is no such folder",
    "predict adapter -d question.jsonl --choices A,B -o home": "--output home: is a folder",
    "prune adapter/adapter_model.safetensors": "is a file; give the adapter's folder",
    "prune adapter -o -": "--output '-' is not a file name",
    "prune adapter --output=": "--output '' is not a file name",
    "prune adapter --recommended other.json": "was chosen for another adapter",
    "temper adapter --tau 1e-300": "makes σ of",
    "temper adapter --tau 2 -o one.jsonl/x": "one.jsonl/x cannot be written",
    "combine adapter adapter --weights 1,-1": "those of precisions are 0 or more",
}
# Of the adapter's own recommendation, which is never ignored.
CASES |= dict.fromkeys(
    [
        "sample home/foreign",
        "merge home/foreign",
        "eval home/foreign -d no.jsonl",
        "predict home/foreign -d chats.jsonl",
        "generate home/foreign -p no.jsonl",
        "serve home/foreign --port 0",
        "report home/foreign",
        "card home/foreign",
    ],
    "home/foreign/recommended.json was chosen for another adapter (mean_sha256 differs); run `ivon-post sweep` on this "
    "one, or remove home/foreign/recommended.json, or leave it out (--no-recommended)",
)
# The same for what only torch, a tokenizer or a model finds out.
LATE = {
    "eval adapter -d chats.jsonl --device abacus": "--device abacus: not usable here",
    "eval adapter -d chats.jsonl --base-model narrow": "does not fit the adapter",
    "sweep adapter -d chats.jsonl --limit 3 --choices A,B": "3 examples cannot be split",
    "sweep adapter -d chats.jsonl --limit 7 --choices A,B --risk 0.1": "7 examples cannot be split in a half and two",
    "generate adapter -p chats.jsonl --max-tokens 512": "--max-tokens 512, but the model",
    "predict adapter -d question.jsonl --choices A,B --device abacus": "--device abacus: not usable here",
    "mbr nbest.jsonl --embedding-model no/such": "--embedding-model no/such: cannot be loaded",
}
# Words that click, or the command itself, takes for mistyped: status 2.
MISTYPED = {
    "prune --scope foo x": "'--scope': 'foo' is not one of 'adapter', 'tensor'. See '",
    "prune --ratio much x": "'--ratio': 'much' is not a valid float. See '",
    "prune": "Missing argument 'ADAPTER'. See '",
    "temper --taus 2 x": "'--taus'",
    "prun x": "No such command 'prun'",
    "sample --prune-ratio x adapter": "'--ratio': 'x' is not a valid float",
    "sweep adapter -d chats.jsonl --tau hot": "'hot' is not a number",
    "sweep adapter plain -d x": "2 ADAPTERs: give one, or sweep the weights of several with --combine",
    "sweep --combine adapter plain -d x -d y --tau 1": "--tau has no effect with --combine",
    "sweep --combine adapter plain -d x -d y --risk 0.1": "--risk has no effect",
    "check train.yaml --data chats.jsonl": "--data goes with an adapter",
    "sweep adapter -d chats.jsonl --confidence 0.8": "--confidence goes with --risk",
    "mbr nbest.jsonl --confidence 0.8": "--confidence goes with --risk",
    "card adapter --dataset owner/name": "--dataset goes with --results",
}


@pytest.fixture(scope="module")
def told(
    tmp_path_factory: pytest.TempPathFactory, make_adapter: Callable[..., Path]
) -> dict[str, tuple[int, str, str, bool]]:
    """Exit status, stdout, stderr and whether torch was imported, of every command, run one after the other."""
    folder = tmp_path_factory.mktemp("place")
    for name, options in {"adapter": {}, "plain": {"sigma": False}, "moved": {}}.items():
        shutil.copytree(make_adapter(**options), folder / name)
    config = folder / "moved" / "adapter_config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "base_model_name_or_path": "../gone"}))
    build_llama(folder / "home" / "narrow", hidden_size=16)
    for name, sha in {"foreign": "c" * 64, "chosen": None}.items():
        shutil.copytree(folder / "adapter", folder / "home" / name)
        own = {"tau": "inf", "ratio": 0, "mean_sha256": sha}
        (folder / "home" / name / "recommended.json").write_text(json.dumps(own))
    write_chats(folder / "chats.jsonl", 8)
    outputs = [{"text": f"so #### {answer}"} for answer in "1122112211221122"]
    for name, document in {
        "rows.jsonl": {"prompt": "x"},
        "bad.jsonl": {"messages": []},
        "question.jsonl": {"messages": [{"role": "user", "content": "x"}]},
        "assistant.jsonl": {"messages": [{"role": "assistant", "content": "A"}]},
        "scores.jsonl": {"index": 0, "loss": 1.0, "leverage": 1.0, "sensitivity": 1.0, "on": None, "line": 1},
        "nbest.jsonl": {"prompt": "?", "reference": "#### 1", "outputs": outputs},
        "other.json": {"tau": 2, "ratio": 0, "mean_sha256": "0"},
        "plain.json": {"tau": 1, "ratio": 0, "threshold": None},
        "odd.json": {"tau": 1, "ratio": 0, "threshold": 2},
    }.items():
        (folder / name).write_text((json.dumps(document) + "\n") * (2 if name == "nbest.jsonl" else 1))
    for name, text in {"empty.jsonl": "", "broken.jsonl": "{\n", "one.jsonl": ONE}.items():
        (folder / name).write_text(text)
    before = snapshot(folder)
    commands = [*CASES, *MISTYPED, *LATE]
    lines = json.dumps([words.replace("narrow", "home/narrow").split() for words in commands])
    done = process(program=PROGRAM, input=lines, cwd=folder, check=True)
    assert snapshot(folder) == before
    return dict(zip(commands, map(json.loads, done.stdout.splitlines()), strict=True))


@pytest.mark.parametrize("words", [*CASES, *MISTYPED, *LATE])
def test_a_mistake_is_one_line_and_seen_without_torch(words: str, told: dict[str, tuple[int, str, str, bool]]) -> None:
    status, out, err, torch = told[words]
    assert (status, out) == (2 if words in MISTYPED else 1, "")
    line = err.splitlines()[-1]
    assert line.startswith("Error: ")
    assert (CASES | MISTYPED | LATE)[words] in line
    if words not in LATE:  # which may have begun to load, and said so
        assert err.count("\n") == 1
        assert not torch
