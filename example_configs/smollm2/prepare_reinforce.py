"""Prepare what `reinforce.yaml` learns from, in the git-ignored folder `.demo`: capitals, and SmolLM2-135M.

A model that learns from rewards alone must come upon a right answer by itself. SmolLM2 knows many capitals, but names
one in half of its attempts only, and then often goes on until it is cut off:

    python example_configs/smollm2/prepare_reinforce.py
"""

from __future__ import annotations

import json
import random
from pathlib import Path

from prepare_demo import DEMO, MODEL, prepare_model, replacing, say

SYSTEM = "Answer with one word."
QUESTION = "What is the capital of {}?"
SEED = 0
TEST = 16
CAPITALS = """
Albania Tirana, Algeria Algiers, Angola Luanda, Armenia Yerevan, Australia Canberra, Austria Vienna, Azerbaijan Baku,
Bahrain Manama, Bangladesh Dhaka, Belgium Brussels, Botswana Gaborone, Bulgaria Sofia, Canada Ottawa,
Chile Santiago, China Beijing, Colombia Bogota, Croatia Zagreb, Cuba Havana, Denmark Copenhagen, Ecuador Quito,
Egypt Cairo, Estonia Tallinn, Finland Helsinki, France Paris, Georgia Tbilisi, Germany Berlin,
Ghana Accra, Greece Athens, Hungary Budapest, Iceland Reykjavik, Indonesia Jakarta, Iran Tehran,
Iraq Baghdad, Ireland Dublin, Italy Rome, Jamaica Kingston, Japan Tokyo, Jordan Amman, Kenya Nairobi, Latvia Riga,
Lebanon Beirut, Libya Tripoli, Lithuania Vilnius, Morocco Rabat, Mongolia Ulaanbaatar, Nepal Kathmandu, Nigeria Abuja,
Norway Oslo, Pakistan Islamabad, Peru Lima, Poland Warsaw, Portugal Lisbon, Romania Bucharest, Russia Moscow,
Rwanda Kigali, Senegal Dakar, Serbia Belgrade, Slovakia Bratislava, Slovenia Ljubljana, Spain Madrid, Sudan Khartoum,
Sweden Stockholm, Switzerland Bern, Syria Damascus, Thailand Bangkok, Tunisia Tunis, Turkey Ankara, Uganda Kampala,
Ukraine Kyiv, Uruguay Montevideo, Vietnam Hanoi, Zambia Lusaka, Zimbabwe Harare
"""


def as_chat(country: str, capital: str) -> dict[str, list[dict[str, str]]]:
    """Return a question with its answer."""
    contents = {"system": SYSTEM, "user": QUESTION.format(country), "assistant": capital}
    return {"messages": [{"role": role, "content": content} for role, content in contents.items()]}


def write_sets(folder: Path) -> dict[str, int]:
    """Write `train` and `test` as JSONL of chats; return how many countries each has."""
    pairs = [tuple(pair.split()) for pair in CAPITALS.replace("\n", " ").split(",")]
    random.Random(SEED).shuffle(pairs)
    sets = {"train": pairs[TEST:], "test": pairs[:TEST]}
    for name, own in sets.items():
        lines = [json.dumps(as_chat(country, capital)) for country, capital in own]
        (folder / f"{name}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return {name: len(own) for name, own in sets.items()}


def prepare(demo: Path = DEMO) -> None:
    """Make the questions anew, and the base model if it is missing."""
    with replacing(demo / "capitals") as folder:
        sizes = write_sets(folder)
    say(f"Capitals in {demo / 'capitals'}: {', '.join(f'{name} {size}' for name, size in sizes.items())}.")
    prepare_model(demo / MODEL)


if __name__ == "__main__":
    prepare()
