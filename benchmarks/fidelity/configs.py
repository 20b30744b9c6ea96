"""The suites that axolotl trains: one YAML for each run, and the commands.

    python -m benchmarks.fidelity configs causal-axolotl --bigbench DIR --out outputs/causal
    python -m benchmarks.fidelity configs paper --out outputs/paper      # needs a hub and a GPU
    bash outputs/paper/run.sh                                            # as paper-8b, paper-70b, code, multilingual

`run.sh` is resumable: a run whose evaluation is there is skipped. For the paper's suite it begins by writing the six
data sets of the hub as chat JSONL, which this module does:

    python -m benchmarks.fidelity.configs outputs/paper/data
"""

from __future__ import annotations

import argparse
import json
import shlex
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import yaml

LETTERS = "ABCDEFGH"
Row = Mapping[str, Any]
Question = tuple[str, list[str], int]  # question, choices, index of the right one


def _winogrande(row: Row) -> Question:
    return row["sentence"], [row["option1"], row["option2"]], int(row["answer"]) - 1


def _labelled(question: str) -> Callable[[Row], Question]:
    def read(row: Row) -> Question:
        return row[question], list(row["choices"]["text"]), list(row["choices"]["label"]).index(row["answerKey"])

    return read


def _boolq(row: Row) -> Question:
    return f"{row['passage']} {row['question']}", ["no", "yes"], int(row["answer"])


# name: (data set of the hub, its configuration, split to evaluate on, reader)
HUB: dict[str, tuple[str, str | None, str, Callable[[Row], Question]]] = {
    "winogrande_s": ("allenai/winogrande", "winogrande_s", "validation", _winogrande),
    "arc_challenge": ("allenai/ai2_arc", "ARC-Challenge", "test", _labelled("question")),
    "arc_easy": ("allenai/ai2_arc", "ARC-Easy", "test", _labelled("question")),
    "winogrande_m": ("allenai/winogrande", "winogrande_m", "validation", _winogrande),
    "openbookqa": ("allenai/openbookqa", "main", "test", _labelled("question_stem")),
    "boolq": ("google/boolq", None, "validation", _boolq),
}


def as_chat(question: Question) -> dict[str, list[dict[str, str]]]:
    """Return a multiple-choice question as the chat that axolotl trains on and `ivon-post eval` asks."""
    text, choices, right = question
    lettered = " ".join(f"{letter}. {choice}" for letter, choice in zip(LETTERS, choices, strict=False))
    prompt = f"Select one of the choices that answers the following question: {text} Choices: {lettered} Answer:"
    return {
        "messages": [{"role": "user", "content": prompt}, {"role": "assistant", "content": LETTERS[right]}],
    }


def write_hub_data(folder: Path) -> None:
    """Write the six data sets of the paper's commonsense table, from the hub, as NAME.train and NAME.validation."""
    from datasets import load_dataset

    folder.mkdir(parents=True, exist_ok=True)
    for name, (path, configuration, held_out, read) in HUB.items():
        for split, ending in (("train", "train"), (held_out, "validation")):
            rows = load_dataset(path, configuration, split=split)
            lines = [json.dumps(as_chat(read(row)), ensure_ascii=False) for row in rows]
            (folder / f"{name}.{ending}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")


def _trained_on(suite: Mapping[str, Any], task: str, data: Path) -> dict[str, Any]:
    if isinstance(suite["tasks"], Mapping):  # data sets of the hub, as they are
        return dict(suite["tasks"][task])
    return {"path": str(data / f"{task}.train.jsonl"), "type": "chat_template"}


def run_configs(suite: Mapping[str, Any], data: Path, out: Path) -> dict[str, dict[str, Any]]:
    """Return name -> axolotl configuration of every task, method, value of the method's grid, and seed."""
    configs = {}
    for task in suite["tasks"]:
        for method, spec in suite["methods"].items():
            [(key, values)] = spec["grid"].items()
            for value in values:
                for seed in suite["seeds"]:
                    name = f"{task}-{method}-{value:g}-{seed}"
                    configs[name] = {
                        **suite["axolotl"],
                        **{option: setting for option, setting in spec.items() if option != "grid"},
                        key: value,
                        "seed": seed,
                        "datasets": [_trained_on(suite, task, data)],
                        "dataset_prepared_path": str(out / "prepared" / task),
                        "output_dir": str(out / name),
                    }
    return configs


def write_configs(suite: Mapping[str, Any], out: Path, bigbench: Path | None) -> list[str]:
    """Write the YAMLs and `run.sh` into `out`; return what to say about them.

    Raises:
        SystemExit: the suite is trained by `python -m benchmarks.fidelity run`, or its data folder is not given.
    """
    if "axolotl" not in suite:
        raise SystemExit("the encoder suite needs no configs: `python -m benchmarks.fidelity run`")
    given = "harness" not in suite and suite["data"] != "hub"
    if given and bigbench is None:
        raise SystemExit("this suite trains on the BIG-bench tasks: give their folder with --bigbench")
    data = (bigbench if given else None) or out / "data"
    out.mkdir(parents=True, exist_ok=True)
    lines = ["#!/bin/bash", "set -e", f"out={shlex.quote(str(out))} data={shlex.quote(str(data))}"]
    if not given and "harness" not in suite:
        lines.append('[ -d "$data" ] || python -m benchmarks.fidelity.configs "$data"')
    configs = run_configs(suite, data, out)
    lines += [
        "one() {  # name, task, and what evaluates it",
        '  [ -s "$out/$1.json" ] && return',
        f'  axolotl train "$out/$1.yaml" {suite["launch"]}'.rstrip(),
        *(_harness(suite) if "harness" in suite else _eval(suite)),
        "}",
    ]
    for name, config in configs.items():
        (out / f"{name}.yaml").write_text(yaml.safe_dump(config, sort_keys=False), encoding="utf-8")
        ivon = config["optimizer"] == "ivon_lora"
        task = next(task for task in suite["tasks"] if name.startswith(f"{task}-"))
        if "harness" not in suite:
            lines.append(f"one {name} {task} {suite['rows']['ivon' if ivon else 'other']}")
        elif ivon:
            lines.append(f"one {name} {task} ivon-posterior adapter=$out/{name},samples=8,load_in=8bit")
        else:
            base = f"pretrained={config['base_model']},peft=$out/{name},load_in_8bit=True"
            lines.append(f"one {name} {task} hf {base}")
    (out / "run.sh").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return [f"{len(configs)} configurations in {out}; train and evaluate them with", f"    bash {out / 'run.sh'}"]


def _eval(suite: Mapping[str, Any]) -> list[str]:
    options = shlex.join(["--json", "--quiet", *suite.get("evaluate", [])])
    return [
        f'  ivon-post eval "$out/$1" --data "$data/$2.validation.jsonl" --rows "$3" {options} > "$out/$1.new"',
        '  mv "$out/$1.new" "$out/$1.json"',
    ]


def _harness(suite: Mapping[str, Any]) -> list[str]:
    harness = suite["harness"]
    words = [
        harness.get("environment", ""),
        "python -m axolotl_ivon.lm_eval",
        '--model "$3" --model_args "$4"',
    ]
    words += [f"--tasks {harness['tasks']}", *harness.get("options", []), '--output_path "$out/$1.new"']
    return ["  " + " ".join(filter(None, words)), '  cat "$out/$1.new"/*/results_*.json > "$out/$1.json"']


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Write the paper's six data sets, from the hub, as chat JSONL.")
    parser.add_argument("folder", type=Path)
    write_hub_data(parser.parse_args().folder)
