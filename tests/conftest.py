"""What several test files use: a small run of both stages, made once."""

from pathlib import Path

import pytest

import pretrain
import sft
from data import world

ROOT = Path(__file__).parent.parent
SIZES = "--n_layer 2 --n_embd 64 --block_size 64 --vocab_size 600 --batch_size 16".split()
load_all = world.load_facts


def few_facts():
    """A world of 48 countries with two attributes."""
    entities, _ = load_all()
    countries = [e for e in entities if e.table == "countries"][:48]
    for country in countries:
        country.values = {a: country.values[a] for a in ("capital", "currency")}
    return countries, []


@pytest.fixture(scope="session")
def small_world(tmp_path_factory):
    """The output folder of a small run of both stages, long enough for the tuned model to answer."""
    out = tmp_path_factory.mktemp("small") / "out with spaces"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(world, "load_facts", few_facts)
        patch.setattr(world, "PINNED", {})
        patch.setattr(world, "QUIZ_SHARE", 0.6)  # of so few facts, a larger share must be quizzed for it to be seen
        pretrain.main(["--out", str(out), "--device", "cpu", *SIZES, "--max_steps", "500", "--eval_every", "250"])
        sft.main(["--out", str(out), "--device", "cpu", "--max_steps", "150"])
    return out
