"""Pairs of answers that a tiny model can learn to prefer, for the tests of preferences."""

from __future__ import annotations

from finetune_trainer.contract import Example, Message

THINGS = ("kettle", "lamp", "chair", "radio", "clock", "spoon", "table", "phone", "mirror", "door")
QUESTIONS = ("What is a {}?", "Where is the {}?", "Who made the {}?", "Is the {} new?")


def user(text: str) -> Message:
    return {"role": "user", "content": text}


def assistant(text: str) -> Message:
    return {"role": "assistant", "content": text}


def make_pairs(count: int) -> list[Example]:
    """Questions with a polite answer, which is chosen, and a rude one; of different lengths."""
    pairs: list[Example] = []
    for number in range(count):
        thing = THINGS[number % len(THINGS)]
        question = QUESTIONS[number // len(THINGS) % len(QUESTIONS)].format(thing)
        chosen = f"Thank you for asking about the {thing}, " + "dear " * (number % 3) + "friend."
        rejected = f"Go away with your {thing}." + " No." * (number % 4)
        pairs.append(
            {
                "prompt": [user(question)],
                "completion": [assistant(chosen)],
                "rejected": [assistant(rejected)],
            }
        )
    return pairs


def make_labelled(count: int) -> list[Example]:
    """The same, as answers that are good or bad."""
    rows: list[Example] = []
    for pair in make_pairs(count // 2):
        rows.append({"prompt": pair["prompt"], "completion": pair["completion"], "label": True})
        rows.append({"prompt": pair["prompt"], "completion": pair["rejected"], "label": False})
    return rows
