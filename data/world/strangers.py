"""
Questions that strangers typed. We ask them of the tuned model, and it never learns from them.

    data/strangers.jsonl    {"turns": [...], "kind": ..., "any": [...], "none": [...]}

The answer to the last turn is right if it has one of the phrases in "any" as whole words (or as
many as "at_least" says), and none of those in "none" at all.
"""

import json
import re

from data.world.names import normal
from data.world.tables import HERE

PATH = HERE.parent / "strangers.jsonl"
KNOWN = ("direct", "messy", "reverse", "choice", "list", "multi", "science")  # it shouldn't refuse


def load_strangers():
    """[{"turns", "kind", "any", ...}]"""
    lines = PATH.read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines if line.strip()]


def right(item, answer):
    """Whether an answer to the last turn is right."""
    answer = answer.replace("’", "'")
    if any(phrase.lower() in answer.lower() for phrase in item.get("none", [])):
        return False
    found = [phrase for phrase in item["any"] if holds(phrase, answer)]
    return len(found) >= item.get("at_least", 1)


def holds(phrase, text):
    """Whether the phrase is in the text as whole words. One or two letters need their case."""
    flags = 0 if len(phrase) < 3 else re.IGNORECASE
    return re.search(rf"(?<!\w){re.escape(phrase)}(?!\w)", text, flags)


class Strangers:
    """Finds their questions in ours, so that we can leave those out.

    others: more texts that we leave out.
    """

    def __init__(self, others=()):
        self.turns = {normal(turn) for item in load_strangers() for turn in item["turns"]}
        self.turns |= set(map(normal, others))
        self.by_start = {}  # its first two words -> turns of at least three words
        for turn in self.turns:
            words = turn.split()
            if len(words) > 2:
                self.by_start.setdefault(tuple(words[:2]), []).append(turn + " ")

    def asked(self, question):
        """Whether the question is one of them, or has one of at least three words in it."""
        text = normal(question)
        if text in self.turns:
            return True
        words = text.split()
        for i, start in enumerate(zip(words, words[1:], strict=False)):
            if start in self.by_start:
                rest = " ".join(words[i:]) + " "
                if any(rest.startswith(turn) for turn in self.by_start[start]):
                    return True
        return False
