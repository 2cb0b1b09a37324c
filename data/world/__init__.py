"""
The embedded world: true facts in tables, told as plain text to pretrain on, as conversations to
fine-tune on, and as questions to ask.

    tables.py       the tables, *.tsv, read and checked
    wordings.py     wordings.tsv: how we tell a fact and ask for it
    names.py        finding names and values in running text
    split.py        which entities are in train, dev and test
    exchanges.py    a question and its answer, from all sides
    threads.py      conversations of several turns
    invented.py     names that don't exist
    noise.py        questions as people type them
    strangers.py    keeping the strangers' questions out
    texts.py        the plain text
    talks.py        the conversations
    questions.py    the questions we ask afterwards
    scorer.py       what counts as an answer

It all comes from one seed and Python's own random numbers, so every machine makes the same bytes.
"""

import json
import random

from common.files import sha256_of, writing
from data.world import tables
from data.world.exchanges import Asker
from data.world.names import bare, pattern_of
from data.world.questions import (
    held_out_finder,
    questions_about,
    read_questions,
    read_smalltalk,
    with_typed,
)
from data.world.scorer import OPTIONS, QUIZ, Scorer, refuses
from data.world.split import PROMPTS, SEASONS, split_entities
from data.world.tables import load_facts, load_smalltalk
from data.world.talks import NOISE, conversations, forbids, held_out_texts
from data.world.texts import Writer
from data.world.wordings import fill, load_wordings

__all__ = [
    "OPTIONS",
    "PROMPTS",
    "QUIZ",
    "ROUNDS",
    "SEASONS",
    "Scorer",
    "bare",
    "build",
    "fill",
    "held_out_finder",
    "is_ours",
    "load_facts",
    "load_smalltalk",
    "load_wordings",
    "pattern_of",
    "read_questions",
    "read_smalltalk",
    "refuses",
    "split_entities",
    "write",
]

UNFINISHED = "unfinished"  # the stamp of a world whose writing was cut off
ROUNDS = 13  # of the corpus; each draws other wordings and another order


def build(seed):
    """Make the whole world. Returns a dict.

    "corpus" and "val" are lists of documents, "sft" is conversations, "train", "dev" and "test" are
    questions, and "smalltalk" is prompts with their responses.
    """
    made, wordings, rng = tables.load_tables(), load_wordings(), random.Random(seed)
    sides = split_entities(made.entities, made.free + made.concepts, seed)

    def asker(side, only=True, unseen=False):
        kept = [
            [thing for thing in group if not only or sides[thing.name] == side]
            for group in (made.entities, made.free, made.concepts)
        ]
        return Asker(made, wordings, *kept, {side}, rng, unseen)

    def questions(side):
        return questions_about(asker(side), asker(side, unseen=True))

    writer, tutor = Writer(asker("train", only=False)), Writer(asker("train"), NOISE)
    corpus, val = writer.documents(ROUNDS), writer.documents(1)
    held_out = [thing for thing in made.free + made.concepts if sides[thing.name] != "train"]
    names = sum((e.names for e in made.entities if sides[e.name] != "train"), [])
    forbidden = forbids(names, held_out_texts(held_out, made.frames))
    smalltalk = [
        {"prompt": row["prompts"][0], "unseen": row["unseen"][0], "response": row["response"]}
        for row in made.smalltalk
    ]
    talks = conversations(tutor, forbidden)
    asked = {side: questions(side) for side in ("train", "dev", "test")}
    asked["train"] = with_typed(asked["train"], tutor, forbidden)
    return {
        "corpus": corpus,
        "val": val[: len(val) // 8],  # the same facts in other words; part of a round is enough
        "sft": talks,
        **asked,
        "smalltalk": smalltalk,
    }


def write(made, folder, fingerprint=""):
    """Write what build() made as files that you can open and read.

    corpus.txt and val.txt are plain text, and the .jsonl files are JSON Lines. The file sha256
    holds the fingerprint. The base checkpoint stores it too, so we notice another model's world.
    A hash of the files follows, so we notice your changes and never overwrite them.
    """
    stamp = folder / "sha256"
    with writing(stamp, "w") as file:  # until all files are written, they belong to no checkpoint
        file.write(UNFINISHED)
    for path in files_of(made, folder):
        name, items = path.stem, made[path.stem]
        if name in ("corpus", "val"):
            text = "\n\n".join(items) + "\n"
        else:
            text = "".join(json.dumps(item, ensure_ascii=False) + "\n" for item in items)
        with writing(path, "w") as file:
            file.write(text)
    with writing(stamp, "w") as file:
        file.write(f"{fingerprint} {sha256_of(*files_of(made, folder))}")


def files_of(made, folder):
    return [folder / f"{name}.{'txt' if name in ('corpus', 'val') else 'jsonl'}" for name in made]


def is_ours(folder, made):
    """Whether write() may write to a folder: all that it would replace is as we wrote it."""
    paths, stamp = files_of(made, folder), folder / "sha256"
    if not any(path.exists() for path in paths):
        return not folder.is_file()
    found = stamp.read_text(encoding="utf-8", errors="replace") if stamp.is_file() else ""
    return found == UNFINISHED or found.endswith(f" {sha256_of(*paths)}")
