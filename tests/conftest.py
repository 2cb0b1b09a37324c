"""A small run of both stages, made once and used by several test files."""

import os
import zlib
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # for tiny networks, more threads are slower

import pytest

import pretrain
import sft
from browser import CHROMIUM, MISSING, Browser
from data import world
from data.world import questions, split, strangers, tables, talks, texts, wordings

ROOT = Path(__file__).parent.parent
SIZES = "--n_layer 2 --n_embd 64 --block_size 128 --vocab_size 1000 --batch_size 8".split()
load_all_tables, load_all_strangers = tables.load_tables, strangers.load_strangers
side_of = split.side_of


def few_of_each_side(questions):
    """Eight unknown questions of train, two of dev and two of test."""
    sides = {side: [] for side in ("train", "dev", "test")}
    for question in questions:
        sides[side_of(question, "unknown")].append(question)
    return [*sides["train"][:8], *sides["dev"][:2], *sides["test"][:2]]


def side_of_few(group, seed):
    """Keep more for testing: a fifth of so few countries would be too few to ask about."""
    return side_of(group, seed) if zlib.crc32(group.encode()) % 3 else "test"


def load_few_tables():
    """48 countries with two attributes each, two styles and a handful of small talk.

    There are no free questions and no concepts. The unseen wordings of a style are some of those
    that we train on otherwise: so small a model would hardly understand a stranger wording.
    """
    made = load_all_tables()
    made.entities = [entity for entity in made.entities if entity.table == "countries"][:48]
    for country in made.entities:
        country.values = {key: country.values[key] for key in ("capital", "currency")}
    made.free, made.concepts = [], []
    first_rows = {row["kind"]: row for row in reversed(made.smalltalk)}
    made.smalltalk = [first_rows[kind] for kind in ("greeting", "name", "joke", "thanks")]
    made.styles = [style for style in made.styles if style["style"] in ("pirate", "robot")]
    for style in made.styles:
        style["unseen"] = style["instructions"][::4]
        style["instructions"] = [i for i in style["instructions"] if i not in style["unseen"]]
    made.unknown = {about: few_of_each_side(made.unknown[about]) for about in ("-", "me")}
    return made


def load_few_wordings():
    """At most four wordings for each use, and none that need a country's other attributes."""
    made = wordings.load_wordings()
    del made.texts["countries", "*"]["about"]
    for uses in made.texts.values():
        for use, templates in uses.items():
            uses[use] = templates if "unseen" in use else templates[:4]
    return made


def load_few_strangers():
    return load_all_strangers()[::10]


def make_world_small(patch):
    """Replace the embedded world by a small one. patch: a MonkeyPatch."""
    patch.setattr(tables, "load_tables", load_few_tables)
    patch.setattr(world, "load_wordings", load_few_wordings)
    patch.setattr(split, "side_of", side_of_few)
    patch.setattr(strangers, "load_strangers", load_few_strangers)
    patch.setattr(texts, "as_typed", lambda question, *chatter: question)  # nobody mistypes
    # A small model needs more of what we test: questions, styles and names that don't exist.
    patch.setattr(texts, "PLAIN", 1.0)
    patch.setattr(texts, "QUIZ_SHARE", 0.6)
    patch.setattr(texts.Writer, "cards", lambda writer: [])
    for module, share in ((texts, 0.25), (talks, 0.4)):
        patch.setattr(module, "UNKNOWN_SHARE", share)
        patch.setattr(module, "STYLED", 0.5)
    patch.setattr(questions, "STYLE_SHARE", 1.0)
    patch.setattr(questions, "UNKNOWN", 1.0)


@pytest.fixture(scope="session")
def small_world(tmp_path_factory):
    """The output folder of a run that is long enough for the tuned model to answer."""
    out = tmp_path_factory.mktemp("small") / "out with spaces"
    common = ["--out", str(out), "--device", "cpu"]
    with pytest.MonkeyPatch.context() as patch:
        make_world_small(patch)
        pretrain.main([*common, *SIZES, "--max_steps", "500", "--eval_every", "250"])
        sft.main([*common, "--max_steps", "150"])
    return out


@pytest.fixture(scope="session")
def browser(tmp_path_factory):
    if not CHROMIUM:
        pytest.skip(MISSING)
    browser = Browser(tmp_path_factory.mktemp("profile"))
    yield browser
    browser.close()
