"""What counts as an answer, on completions made by hand; checkpoints; what is shown."""

from pathlib import Path

import numpy as np
import pytest
import torch

import compare
from compare import InputError, complete, load, respond, save, text_loss
from data import Tokenizer
from data.report import side_by_side
from data.world import Scorer
from model import GPT, GPTConfig


@pytest.fixture(scope="module")
def scorer():
    return Scorer()


CAPITAL = {"table": "countries", "attribute": "capital"}
KENYA = {**CAPITAL, "name": "Kenya", "accept": ["Nairobi"]}
MEXICO = {**CAPITAL, "name": "Mexico", "accept": ["Mexico City"]}
SENEGAL = {"table": "countries", "attribute": "currency", "name": "Senegal", "accept": ["West African CFA franc", "CFA franc"]}
SOUTH_AFRICA = {"table": "countries", "attribute": "continent", "name": "South Africa", "accept": ["Africa"]}
IODINE = {"table": "elements", "attribute": "symbol", "name": "iodine", "accept": ["I"]}
IRON = {"table": "elements", "attribute": "number", "name": "iron", "accept": ["26"]}
SEASONS = {"attribute": "free question", "name": "What is the primary cause of Earth's seasons?", "keys": [["tilt", "tilted"], ["axis"]]}


@pytest.mark.parametrize(
    "item, text, right",
    [
        (KENYA, "The capital of Kenya is Nairobi.", True),
        (KENYA, "Nairobi", True),
        (KENYA, "The capital of Kenya is nairobi.", False),  # case-sensitive
        (KENYA, "The capital of Kenya is Nairobian.", False),  # whole words
        (KENYA, "The capital of Kenya is Nairobi or Lima.", False),  # another value
        (KENYA, "The capital of Kenya is Lima.", False),
        (KENYA, "I do not know.", False),
        (KENYA, "", False),
        (KENYA, "Is it Nairobi?", False),  # a question is no statement
        (KENYA, "\nA) Nairobi\nB) Lima", False),  # nor are options
        (KENYA, "A) Nairobi", False),
        (MEXICO, "The capital of Mexico is Mexico City.", True),
        (MEXICO, "The capital of Mexico is Mexico.", False),
        (SENEGAL, "The currency of Senegal is the West African CFA franc.", True),
        (SENEGAL, "It is the CFA franc.", True),
        (SENEGAL, "The currency of Senegal is the Central African CFA franc.", False),  # longest first
        (SOUTH_AFRICA, "South Africa is in Africa.", True),
        (SOUTH_AFRICA, "South Africa is in Asia.", False),  # its own name is no answer
        (SOUTH_AFRICA, "South Africa.", False),
        (IODINE, "The chemical symbol of iodine is I.", True),
        (IODINE, "The chemical symbol of iodine is Io.", False),
        (IRON, "The atomic number of iron is 26.", True),
        (IRON, "The atomic number of iron is 126.", False),
        (SEASONS, "It is the tilt of the Earth's axis.", True),
        (SEASONS, "Its axis is tilted.", True),
        (SEASONS, "It is the distance from the sun.", False),
        (SEASONS, "The axis of the Earth.", False),
        (SEASONS, "A) The tilt of the axis.", False),
    ],
)
def test_what_counts_as_an_answer(item, text, right, scorer):
    assert scorer.answered(item, text) is right


@pytest.mark.parametrize(
    "item, text, known",
    [
        (KENYA, " Nairobi. The capital of Peru is Lima.", True),
        (KENYA, " Lima. Nairobi", False),
        (KENYA, " Nairobis", False),
        ({**KENYA, "accept": ["euro"]}, " the euro.", True),
        ({**KENYA, "accept": ["owl", "owlet"]}, " an owlet", True),
        (SEASONS, " tilt of the axis.\nA) sun", True),
        (SEASONS, " sun.\ntilt of the axis", False),
    ],
)
def test_what_counts_as_knowing(item, text, known, scorer):
    assert scorer.knows(item, text) is known


@pytest.fixture(scope="module")
def pair():
    torch.manual_seed(0)
    tokenizer = Tokenizer.train([Path(__file__).read_text(encoding="utf-8")], 280)
    model = GPT(GPTConfig(block_size=32, vocab_size=tokenizer.n_vocab, n_layer=2, n_head=2, n_embd=32)).eval()
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.3)
    return model, tokenizer


def test_a_checkpoint_comes_back(pair, tmp_path):
    model, tokenizer = pair
    save(tmp_path / "base.pt", model, tokenizer, stage="base", trained_on={"files": ["a b.txt"]})
    model2, tokenizer2 = load(tmp_path / "base.pt")
    ids = torch.tensor([tokenizer.encode("the cat sat")])
    assert torch.equal(model2(ids)[0], model(ids)[0]) and not model2.training
    assert model2.embed.weight is model2.head.weight
    assert tokenizer2.encode("the cat 고양이 🦜") == tokenizer.encode("the cat 고양이 🦜")
    assert torch.load(tmp_path / "base.pt", weights_only=True)["trained_on"] == {"files": ["a b.txt"]}
    assert not (tmp_path / "base.pt.tmp").exists()


class Payload:
    def __reduce__(self):
        return (open, ("gotcha", "w"))


def test_a_checkpoint_is_data_and_nothing_else(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"format": compare.FORMAT, "config": Payload()}, tmp_path / "base.pt")
    with pytest.raises(InputError, match="not a checkpoint"):
        load(tmp_path / "base.pt")
    assert not (tmp_path / "gotcha").exists()


def test_completions(pair):
    model, tokenizer = pair
    prompts = ["the", "the cat sat on", "<|end|><|user|>", "mat"]
    texts = respond(model, tokenizer, prompts, max_new_tokens=10)
    assert texts == [respond(model, tokenizer, [prompt], max_new_tokens=10)[0] for prompt in prompts]
    chat = [tokenizer.user, *tokenizer.encode("the"), tokenizer.end, tokenizer.assistant]
    new = model.generate([chat], 10, temperature=0, stop=tokenizer.end)[0]
    assert complete(model, tokenizer, ["the"], max_new_tokens=10)[0] == (tokenizer.decode([i for i in new if i != tokenizer.end]), tokenizer.end in new)
    document = [tokenizer.endoftext, *tokenizer.encode("the")]
    plain = model.generate([document], 10, temperature=0, stop=tokenizer.endoftext)[0]
    assert respond(model, tokenizer, ["the"], chat=False, max_new_tokens=10)[0] == tokenizer.decode([i for i in plain if i != tokenizer.endoftext])


def test_text_loss_is_over_every_token_but_the_first(pair):
    model, tokenizer = pair
    tokens = np.array([tokenizer.endoftext, *tokenizer.encode("the cat sat on the mat. " * 30)])
    nats, bits = text_loss(model, tokens, tokenizer)
    T, losses = 32, {}
    for start in list(range(0, len(tokens) - T, T - 1)) + [len(tokens) - T]:
        ids = torch.from_numpy(tokens[start : start + T])[None]
        logits = model(ids, ids)[0].log_softmax(-1)
        for t in range(T - 1):
            losses.setdefault(start + t + 1, -logits[t, ids[0, t + 1]].item())  # a token's first score counts
    assert len(losses) == len(tokens) - 1
    assert nats == pytest.approx(sum(losses.values()) / len(losses), rel=1e-5)
    assert bits == pytest.approx(sum(losses.values()) / 0.6931472 / len("the cat sat on the mat. " * 30), rel=1e-5)


def test_side_by_side_fits_a_terminal():
    lines = side_by_side("A) one\nB) two\n\n" + "long " * 30, "The answer is " + "short " * 20)
    assert all(len(line) <= 80 for line in lines) and all(" | " in line + " " for line in lines)
    assert lines[0].startswith("A) one ") and "The answer" in lines[0]
