"""
The embedded world: true facts in tables, told as plain text to pretrain on, as conversations to
fine-tune on, and as questions to ask.

    tables.py       facts/*.tsv and smalltalk.tsv, read and checked
    wordings.py     wordings.tsv: how we tell a fact and ask for it
    names.py        finding names and values in running text
    split.py        which entities are in train, dev and test
    texts.py        the plain text
    talks.py        the conversations
    questions.py    the questions
    scorer.py       what counts as an answer

It all comes from one seed and Python's own random numbers, so every machine makes the same bytes.
"""

import json
import random

from common.files import writing
from data.world import tables
from data.world.names import bare, pattern_of
from data.world.questions import questions_about, read_questions, read_smalltalk
from data.world.scorer import OPTIONS, Scorer
from data.world.split import PROMPTS, SEASONS, split_entities
from data.world.tables import load_facts, load_smalltalk
from data.world.talks import conversations
from data.world.texts import Writer
from data.world.wordings import fill, load_wordings

__all__ = [
    "OPTIONS",
    "PROMPTS",
    "ROUNDS",
    "SEASONS",
    "Scorer",
    "bare",
    "build",
    "fill",
    "load_facts",
    "load_smalltalk",
    "load_wordings",
    "pattern_of",
    "read_questions",
    "read_smalltalk",
    "split_entities",
    "write",
]

ROUNDS = 4  # how often the corpus tells all facts, each time in other wordings and another order


def build(seed):
    """Make the whole world. Returns a dict.

    "corpus" and "val" are lists of documents, "sft" is conversations, "train", "dev" and "test" are
    questions, and "smalltalk" is prompts with their responses.
    """
    entities, free = tables.load_facts()
    smalltalk = tables.load_smalltalk()
    sides = split_entities(entities, free, seed)
    writer = Writer(entities, free, smalltalk, load_wordings(), random.Random(seed))
    corpus = writer.documents(ROUNDS)
    val = writer.documents(1)
    return {
        "corpus": corpus,
        "val": val[: len(val) // 8],  # the same facts in other words; part of a round is enough
        "sft": conversations(writer, sides),
        "train": questions_about(writer, sides, "train"),
        "dev": questions_about(writer, sides, "dev"),
        "test": questions_about(writer, sides, "test"),
        "smalltalk": smalltalk,
    }


def write(made, folder, fingerprint=""):
    """Write what build() made as files that you can open and read.

    corpus.txt and val.txt are plain text, and the .jsonl files are JSON Lines. The file sha256
    holds the fingerprint. The base checkpoint stores it too, so we notice another model's world.
    """
    stamp = folder / "sha256"
    stamp.unlink(missing_ok=True)  # until all files are written, they belong to no checkpoint
    for name, items in made.items():
        if name in ("corpus", "val"):
            path, text = folder / f"{name}.txt", "\n\n".join(items) + "\n"
        else:
            path = folder / f"{name}.jsonl"
            text = "".join(json.dumps(item, ensure_ascii=False) + "\n" for item in items)
        with writing(path, "w") as file:
            file.write(text)
    with writing(stamp, "w") as file:
        file.write(fingerprint)
