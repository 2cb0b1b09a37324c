"""A small run of both stages, made once and used by several test files."""

import os
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # for tiny networks, more threads are slower

import pytest

import pretrain
import sft
from data.world import tables, texts

ROOT = Path(__file__).parent.parent
SIZES = "--n_layer 2 --n_embd 64 --block_size 64 --vocab_size 600 --batch_size 16".split()
load_all_facts = tables.load_facts


def load_few_facts():
    """48 countries with two attributes each, and no free questions."""
    entities, _ = load_all_facts()
    countries = [entity for entity in entities if entity.table == "countries"][:48]
    for country in countries:
        country.values = {key: country.values[key] for key in ("capital", "currency")}
    return countries, []


@pytest.fixture(scope="session")
def small_world(tmp_path_factory):
    """The output folder of a run that is long enough for the tuned model to answer."""
    out = tmp_path_factory.mktemp("small") / "out with spaces"
    common = ["--out", str(out), "--device", "cpu"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tables, "load_facts", load_few_facts)
        patch.setattr(texts, "QUIZ_SHARE", 0.6)  # with so few facts, 0.1 would be too few quizzes
        pretrain.main([*common, *SIZES, "--max_steps", "500", "--eval_every", "250"])
        sft.main([*common, "--max_steps", "150"])
    return out
