"""Prepare what `arithmetic.yaml` trains on, in the git-ignored folder `.demo`: word problems, and SmolLM2-135M.

Every problem takes two steps, which the answer writes down before the result, in the manner of GSM8K:

    Tom has 12 apples. Tom buys 7 more and gives 5 to Ana. How many are left?
    12 + 7 = 19. 19 - 5 = 14. #### 14

    python example_configs/smollm2/prepare_arithmetic.py
"""

from __future__ import annotations

import json
import random
from pathlib import Path

from prepare_demo import DEMO, MODEL, prepare_model, replacing, say

SYSTEM = "Solve step by step."
SIZES = {"train": 640, "test": 32}
SEED = 0
NAMES = ("Tom", "Ana", "Ravi", "Mei", "Omar", "Lena", "Kofi", "Ines")
THINGS = ("apples", "coins", "books", "pens", "shells", "stamps", "cards", "nuts")


def write_problem(draw: random.Random) -> tuple[str, str]:
    """Return one question and its worked answer."""
    name, other = draw.sample(NAMES, 2)
    things = draw.choice(THINGS)
    a, b = draw.randint(6, 40), draw.randint(3, 30)
    boxes, each = draw.randint(2, 9), draw.randint(3, 12)
    product = boxes * each
    packed = f"{boxes} boxes with {each} {things} in each"
    kind = draw.randrange(4)
    if kind == 0:
        c = draw.randint(2, a + b - 1)
        question = f"{name} has {a} {things}. {name} buys {b} more and gives {c} to {other}. How many are left?"
        steps = [f"{a} + {b} = {a + b}", f"{a + b} - {c} = {a + b - c}"]
    elif kind == 1:
        c = draw.randint(1, product - 1)
        question = f"{name} has {packed}. {name} loses {c} {things}. How many are left?"
        steps = [f"{boxes} * {each} = {product}", f"{product} - {c} = {product - c}"]
    elif kind == 2:
        question = f"{name} has {a} {things}. {other} brings {packed}. How many are there?"
        steps = [f"{boxes} * {each} = {product}", f"{a} + {product} = {a + product}"]
    else:
        question = f"{name} has {a} {things}. {other} has {b} more than {name}. How many do they have together?"
        steps = [f"{a} + {b} = {a + b}", f"{a} + {a + b} = {2 * a + b}"]
    result = steps[-1].rpartition(" ")[2]
    return question, f"{steps[0]}. {steps[1]}. #### {result}"


def write_sets(folder: Path, sizes: dict[str, int]) -> None:
    """Write each set as JSONL of chats; no question occurs twice, in one set or in two."""
    draw = random.Random(SEED)
    seen: set[str] = set()
    for name, size in sizes.items():
        lines: list[str] = []
        while len(lines) < size:
            question, answer = write_problem(draw)
            if question not in seen:
                seen.add(question)
                contents = {"system": SYSTEM, "user": question, "assistant": answer}
                messages = [{"role": role, "content": content} for role, content in contents.items()]
                lines.append(json.dumps({"messages": messages}))
        (folder / f"{name}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")


def prepare(demo: Path = DEMO) -> None:
    """Make the problems anew, and the base model if it is missing."""
    with replacing(demo / "arithmetic") as folder:
        write_sets(folder, SIZES)
    say(f"Problems in {demo / 'arithmetic'}: {', '.join(f'{name} {size}' for name, size in SIZES.items())}.")
    prepare_model(demo / MODEL)


if __name__ == "__main__":
    prepare()
