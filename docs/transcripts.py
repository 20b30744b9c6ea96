"""Write the transcripts that the pages show: every `ivon-post` command, really run on an adapter that is trained here.

    python docs/transcripts.py [NAME ...]

The base model is the tests' tiny Llama (two layers, hidden size 32), first taught in full that an answer is A or B; the
adapters learn which, from questions of which a tenth has the wrong answer. The figures say nothing about other models.
When to abstain is shown with the adapter that `make demo` has left.
"""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

DOCS = Path(__file__).resolve().parent
GENERATE = "ivon-post generate out --prompts test.jsonl --limit 40 -n 8 --max-tokens 4"
SURE = "ivon-post sweep .demo/ivon --data held-out.jsonl --tau 1,inf --ratio 0 --samples 4"
# File of the transcript -> its commands.
COMMANDS = {
    "info": ["ivon-post info out"],
    "check": ["ivon-post check out --data validation.jsonl"],
    "fit": [
        "ivon-post fit adamw --data train.jsonl --validation validation.jsonl -o fitted",
        "ivon-post eval fitted --data test.jsonl --rows mean,posterior",
        "ivon-post fit adamw --data train.jsonl --method tfb --tolerance 0.01 -o tfb",
    ],
    "prune": ["ivon-post prune --ratio 0.1 out"],
    "temper": ["ivon-post temper --tau 2 out"],
    "sample": ["ivon-post sample -n 3 out -o ensemble", "ls ensemble", "ls ensemble/sample-0000"],
    "merge": ["ivon-post merge out", "ls out-merged"],
    "combine": ["ivon-post combine out other -o both"],
    "diff": ["ivon-post diff out other"],
    "eval": ["ivon-post eval out --data test.jsonl"],
    "eval-more": [
        "ivon-post eval out --data test.jsonl --rows mean,posterior --calibrate validation.jsonl --ood strange.jsonl "
        "-o examples.jsonl",
        "head -n 1 examples.jsonl | cut -c 1-330",
    ],
    "sweep": [
        "ivon-post sweep out --data validation.jsonl --tau 0.5,1,2,inf --ratio 0,0.1,0.3",
        "head -n 8 out-sweep/recommended.json",
        "ivon-post eval out --data test.jsonl --recommended out-sweep/recommended.json --rows base,mean,posterior",
    ],
    "predict": [
        "ivon-post predict out --data test.jsonl --limit 3 --threshold 0.7",
        "echo 'sun and rain' | ivon-post predict out --format csv",
        "ivon-post predict out --data test.jsonl --threshold 0.7 -o decisions.jsonl",
    ],
    "weights": ["ivon-post sweep --combine out other --data validation.jsonl --data test.jsonl -o weights"],
    "abstain": [  # of the demo's adapter, on snippets that it was not trained on
        "tail -n 400 .demo/data/movie-train.jsonl > held-out.jsonl",
        f"{SURE} --risk 0.01 -o surest | grep threshold",
        f"{SURE} --risk 0.15 -o sure | grep 'answer from'",
        "grep -A 9 threshold sure/recommended.json",
        "ivon-post eval .demo/ivon --data .demo/data/movie.jsonl --recommended sure/recommended.json --rows mean "
        "| grep answered",
    ],
    "generate": [
        f"{GENERATE} --per-model 2 -o posterior.jsonl",
        f"{GENERATE} --mean -o mean.jsonl",
        "head -n 1 posterior.jsonl | cut -c 1-300",
    ],
    "mbr": ["ivon-post mbr mean.jsonl posterior.jsonl --answer-regex choice -o chosen", "ls chosen"],
    "report": [
        "ivon-post report out --data test.jsonl --sweep out-sweep/recommended.json",
        "ls out-report.html",
    ],
    "influence": [
        "ivon-post influence out --data train.jsonl --on validation.jsonl -o influence.jsonl",
        "head -n 1 influence.jsonl",
        "ivon-post influence out --data train.jsonl --scores influence.jsonl --keep 0.953125 -o clean.jsonl "
        "| tail -n 2",
        "wc -l train.jsonl clean.jsonl",
    ],
    "card": [
        "ivon-post card out",
        "ivon-post eval out --data test.jsonl --json > eval.json",
        "ivon-post card out --results eval.json --recommended out-sweep/recommended.json",
        "grep -A 9 ^Recommended out/README.md",
        "sed -n '/## Measured/,$p' out/README.md",
        "head -n 5 out/.eval_results/ivon-mean.yaml",
    ],
    "sample-serve": ["ivon-post sample out -n 2 --serve vllm -o served", "cat served/serve.sh"],
    "serve": [
        "ivon-post serve out",
        "curl -s localhost:8000/v1/chat/completions -H 'Content-Type: application/json' "
        """-d '{"model": "out", "messages": [{"role": "user", "content": "red dog"}], "max_tokens": 1, """
        """"temperature": 0}' """
        "| python -m json.tool",
    ],
    "mistake": ["ivon-post prune --ratio 1.5 out"],
}


def write_questions(path: Path, count: int, seed: int, wrong: float) -> None:
    """Write one-turn chats whose answer follows from the first word, but for a share of them."""
    from tiny import write_chats

    draw = random.Random(seed)
    rows = [json.loads(line) for line in write_chats(path, count, seed).read_text().splitlines()]
    for row in rows:
        answer = row["messages"][1]
        if draw.random() < wrong:
            answer["content"] = "AB"["BA".index(answer["content"])]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def write_strange(path: Path, source: Path) -> None:
    """Write the chats of `source` with every word of the questions spelled backwards."""
    rows = [json.loads(line) for line in source.read_text(encoding="utf-8").splitlines()]
    for row in rows:
        question = row["messages"][0]
        question["content"] = " ".join(word[::-1] for word in question["content"].split())
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def read(path: Path, tokenizer: Any) -> list[dict[str, list[int]]]:
    """Tokenize chats; only the answer is trained on."""
    rows = []
    for line in path.read_text(encoding="utf-8").splitlines():
        messages = json.loads(line)["messages"]
        whole = tokenizer.apply_chat_template(messages, tokenize=False)
        given = tokenizer.apply_chat_template(messages[:-1], tokenize=False, add_generation_prompt=True)
        ids, before = (tokenizer(text, add_special_tokens=False)["input_ids"] for text in (whole, given))
        rows.append({"input_ids": ids, "labels": [-100] * len(before) + ids[len(before) :]})
    return rows


def train(folder: Path, data: str, output: str, epochs: int, lora: bool, ivon: bool = True) -> None:
    """Train the base model on `data`, in full or an adapter with IVON-LoRA or AdamW, and save it as `output`."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import (
        AutoModelForCausalLM,
        AutoTokenizer,
        DataCollatorForSeq2Seq,
        Trainer,
        TrainingArguments,
    )

    from axolotl_ivon import attach

    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained("base")
    model: Any = AutoModelForCausalLM.from_pretrained("base")
    if lora:
        targets = ["q_proj", "v_proj"]
        model = get_peft_model(model, LoraConfig(r=8, lora_alpha=16, target_modules=targets, task_type="CAUSAL_LM"))
    arguments = TrainingArguments(
        str(folder / f"{output}-run"),
        per_device_train_batch_size=8,
        num_train_epochs=epochs,
        learning_rate=3e-3,
        save_strategy="no",
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
    )
    rows: Any = read(folder / data, tokenizer)
    collator = DataCollatorForSeq2Seq(tokenizer)
    trainer = Trainer(model, arguments, train_dataset=rows, data_collator=collator, processing_class=tokenizer)
    if lora and ivon:
        attach(trainer)
    trainer.train()
    model.save_pretrained(output)
    tokenizer.save_pretrained(output)


def main() -> None:
    """Train, run every command, and write what it printed."""
    sys.path.insert(0, str(DOCS.parent / "tests" / "helpers"))
    from tiny import build_llama

    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        os.chdir(folder)
        build_llama("base")
        for name, count, seed, wrong in (
            ("format.jsonl", 128, 1, 0.5),
            ("train.jsonl", 128, 2, 0.1),
            ("more.jsonl", 128, 3, 0.1),
            ("validation.jsonl", 200, 4, 0.1),
            ("test.jsonl", 300, 5, 0.1),
        ):
            write_questions(folder / name, count, seed, wrong)
        (folder / ".demo").symlink_to(DOCS.parent / ".demo")
        write_strange(folder / "strange.jsonl", folder / "validation.jsonl")
        train(folder, "format.jsonl", "base", 10, lora=False)
        for data, output in (("train.jsonl", "out"), ("more.jsonl", "other")):
            train(folder, data, output, 40, lora=True)
        train(folder, "train.jsonl", "adamw", 40, lora=True, ivon=False)
        programs = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
        environment = {**os.environ, "PATH": programs, "COLUMNS": "118", "HF_HUB_OFFLINE": "1"}
        (DOCS / "transcripts").mkdir(exist_ok=True)
        for name in sys.argv[1:] or COMMANDS:
            commands, lines = COMMANDS[name], list[str]()
            if name == "serve":
                server = subprocess.Popen(commands[0].split(), env=environment, stdout=subprocess.PIPE, text=True)
                lines = [f"$ {commands[0]}", *(server.stdout.readline().rstrip() for _ in range(3))]  # type: ignore[union-attr]
                commands = commands[1:]
            for command in commands:
                program, *rest = command.split(" | ", 1)
                quiet = " | ".join([f"{program} -q" if program.startswith("ivon-post") else program, *rest])
                done = subprocess.run(quiet, shell=True, env=environment, capture_output=True, text=True, check=False)
                if done.returncode != (name == "mistake"):
                    raise SystemExit(f"{command}\n{done.stderr}")
                printed = (done.stdout + (done.stderr if name == "mistake" else "")).rstrip()
                printed = printed.replace(f"{folder.resolve()}/", "").replace(f"{folder}/", "")
                shown = [
                    line.rstrip() for line in printed.splitlines() if "real_accelerator" not in line
                ]  # DeepSpeed's
                lines += [f"$ {command}", *shown]
            if name == "serve":
                server.terminate()
                server.wait()
            (DOCS / "transcripts" / f"{name}.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
