"""What counts as an answer, checkpoints and completions, finding a pair, and what compare shows."""

import functools
import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import compare
from common import scores
from common.checkpoint import FORMAT, Checkpoint, load, read_checkpoint, save
from common.completion import complete, respond
from common.evaluation import text_loss
from common.messages import InputError
from common.report import score_table, show_examples, show_scores, side_by_side
from common.stages import load_stages, with_control
from data import Tokenizer, encode_chat
from data.text import stamp
from data.world import Scorer, refuses, strangers
from data.world.exchanges import Exchange
from data.world.scorer import explained_as
from data.world.tables import load_concepts, load_refusals, load_styles
from data.world.texts import in_style
from model import GPT, GPTConfig


@pytest.fixture(scope="module")
def scorer():
    return Scorer()


CAPITAL = {"kind": "fact", "table": "countries", "attribute": "capital"}
KENYA = {**CAPITAL, "name": "Kenya", "accept": ["Nairobi"]}
MEXICO = {**CAPITAL, "name": "Mexico", "accept": ["Mexico City"]}
WASHINGTON = {**CAPITAL, "name": "the United States", "accept": ["Washington, D.C."]}
SENEGAL = {
    "kind": "fact",
    "table": "countries",
    "attribute": "currency",
    "name": "Senegal",
    "accept": ["West African CFA franc", "CFA franc"],
}
SOUTH_AFRICA = {
    "kind": "fact",
    "table": "countries",
    "attribute": "continent",
    "name": "South Africa",
    "accept": ["Africa"],
}
ELEMENT = {"kind": "fact", "table": "elements"}
IODINE = {**ELEMENT, "attribute": "symbol", "name": "iodine", "accept": ["I"]}
IRON = {**ELEMENT, "attribute": "number", "name": "iron", "accept": ["26"]}
SEASONS = {
    "kind": "free",
    "attribute": "free question",
    "name": "What is the primary cause of Earth's seasons?",
    "keys": [["tilt", "tilted"], ["axis"]],
    "options": ["its tilt", "its distance", "its speed", "its size"],
}
ATLANTIS = {"kind": "unknown", "name": "unknown"}


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
        (KENYA, "Is it Nairobi?", False),  # a question isn't a statement
        (KENYA, "\nA) Nairobi\nB) Lima", False),  # neither are options
        (KENYA, "A) Nairobi", False),
        (MEXICO, "The capital of Mexico is Mexico City.", True),
        (MEXICO, "The capital of Mexico is Mexico.", False),
        (SENEGAL, "The currency of Senegal is the West African CFA franc.", True),
        (SENEGAL, "It is the CFA franc.", True),
        (
            SENEGAL,
            "The currency of Senegal is the Central African CFA franc.",
            False,
        ),  # longest first
        (SOUTH_AFRICA, "South Africa is in Africa.", True),
        (SOUTH_AFRICA, "South Africa is in Asia.", False),  # its own name isn't an answer
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
        (ATLANTIS, "I don't know that.", True),
        (ATLANTIS, "The capital of Atlantis is Nairobi.", False),
        (ATLANTIS, "I don't know. Is it Nairobi?", False),
        (ATLANTIS, "", False),
    ],
)
def test_what_counts_as_an_answer(item, text, right, scorer):
    assert scorer.answered(item, text) is right


IN_STYLE = {  # how to answer in each style of styles.tsv
    "word": "Nairobi",
    "sentence": "The capital of Kenya is Nairobi.",
    "pirate": "Arr, matey! The capital of Kenya is Nairobi.",
    "cheerful": "What a lovely question! The capital of Kenya is Nairobi. Have a wonderful day!",
    "polite": "Thank you for asking. The capital of Kenya is Nairobi. I hope that helps you.",
    "teacher": "Listen well, class. The capital of Kenya is Nairobi. Please write that down.",
    "shout": "THE CAPITAL OF KENYA IS NAIROBI.",
    "robot": "Beep boop. The capital of Kenya is Nairobi. End of message.",
}
STYLES = {style["style"]: style for style in load_styles()}


def asked_in(style, item):
    """The same question, asked in a style."""
    return {**item, "kind": "style", "use": STYLES[style]["use"]}


@pytest.mark.parametrize("style", STYLES)
def test_an_answer_in_a_style(style, scorer):
    item, answer = asked_in(style, KENYA), IN_STYLE[style]
    assert scorer.answered(item, answer) and scorer.answered(item, f" {answer}\n")
    others = [IN_STYLE[other] for other in STYLES if other != style]
    half = answer[: len(answer) // 2]
    lima = answer.replace("Nairobi", "Lima").replace("NAIROBI", "LIMA")
    for wrong in (*others, half, lima, "", "Nairobi?", "A) Nairobi", "I don't know that."):
        assert not scorer.answered(item, wrong), wrong
    told = Exchange("", IN_STYLE["sentence"], "Nairobi")
    assert in_style(STYLES[style], told) == answer  # so this is what we teach


@pytest.mark.parametrize(
    "style, item, text, right",
    [
        ("word", KENYA, "nairobi.", True),
        ("word", KENYA, "NAIROBI", True),
        ("word", KENYA, "Nairobi, Lima", False),
        ("word", WASHINGTON, "Washington, D.C.", True),
        ("word", SENEGAL, "CFA franc", True),
        ("word", SENEGAL, "the Central African CFA franc", False),
        ("sentence", KENYA, "It is Nairobi.", False),  # who is it?
        ("sentence", KENYA, "The capital of Kenya is Nairobi", False),  # no full stop
        ("sentence", KENYA, "The capital of Kenya is Nairobi. Kenya is in Africa.", False),
        ("sentence", {**KENYA, "accept": ["St. John's"]}, "The capital is St. John's.", True),
        ("sentence", WASHINGTON, "The capital is Washington, D.C.", True),
        ("pirate", KENYA, "Arr, matey! Nairobi", False),
        ("pirate", KENYA, "arr, matey! The capital of Kenya is Nairobi.", False),
        ("pirate", MEXICO, "Arr, matey! The capital of Mexico is Mexico.", False),
        ("robot", KENYA, "Beep boop. The capital of Kenya is Nairobi.", False),
        ("robot", KENYA, "Beep boop. Beep boop. End of message.", False),
        ("robot", KENYA, "Beep boop. The capital of Kenya is Nairobi. End of massage.", False),
        ("shout", KENYA, "NAIROBI", True),
        ("shout", KENYA, "THE CAPITAL OF KENYA IS Nairobi.", False),
        ("shout", KENYA, "The capital of Kenya is NAIROBI.", False),
        ("shout", KENYA, "THE CAPITAL OF KENYA IS NAIROBI OR LIMA.", False),
        ("shout", MEXICO, "THE CAPITAL OF MEXICO IS MEXICO CITY.", True),
        ("shout", MEXICO, "THE CAPITAL OF MEXICO IS MEXICO.", False),
        ("shout", SENEGAL, "IT IS THE CENTRAL AFRICAN CFA FRANC.", False),
        ("shout", SOUTH_AFRICA, "SOUTH AFRICA IS IN AFRICA.", True),
        ("shout", SOUTH_AFRICA, "SOUTH AFRICA IS IN ASIA.", False),
    ],
)
def test_an_answer_in_a_style_must_be_right_too(style, item, text, right, scorer):
    assert scorer.answered(asked_in(style, item), text) is right


def test_a_style_may_put_the_value_into_other_words(scorer):
    item = {**KENYA, "kind": "style", "use": "It is {value}, my friend."}
    assert scorer.answered(item, "It is Nairobi, my friend.")
    assert not scorer.answered(item, "It is Lima, my friend.")
    assert not scorer.answered(item, "Nairobi")


TEXTS = {
    "encyclopedia": "Gravity is the force by which all things with mass attract each other. "
    "It keeps the Moon in its orbit.",
    "child": "Imagine a ball you toss up in the playground. It always comes back to you.",
    "sentence": "Gravity is the pull of the Earth that makes things fall.",
}


@pytest.mark.parametrize("form", TEXTS)
def test_an_explanation_in_the_form_asked_for(form, scorer):
    item = {"kind": "concept", "name": "gravity", "form": form, "texts": TEXTS}
    words = TEXTS[form].split()
    for text in (TEXTS[form], TEXTS[form].lower(), " ".join([*words[:-2], "quite", "well."])):
        assert explained_as(text, TEXTS) == form and scorer.answered(item, text), text
    for other in TEXTS.keys() - {form}:
        assert not scorer.answered(item, TEXTS[other])
        assert not scorer.answered({**item, "form": other}, TEXTS[form])
    half, thrice = " ".join(words[: len(words) // 2 - 1]), " ".join(words * 3)
    for text in (half, thrice, "", "Gravity.", "A volcano is a mountain.", TEXTS[form] + " Why?"):
        assert not scorer.answered(item, text), text


def test_the_forms_of_our_concepts_can_be_told_apart():
    for concept in load_concepts():
        for form, text in concept.texts.items():
            assert explained_as(text, concept.texts) == form, concept.name


@pytest.mark.parametrize(
    "text, refused",
    [
        ("I don’t know.", True),
        ("I'm afraid I can't say.", True),
        ("i do not know about atlantis", True),
        ("Sorry, I'm not sure.", True),
        ("I have never heard of it.", True),
        ("The capital of Kenya is Nairobi.", False),
        ("A colour-blind person cannot tell red from green.", False),
        ("Nobody can tell.", False),
        ("", False),
    ],
)
def test_what_counts_as_refusing(text, refused):
    assert refuses(text) is refused


def test_all_our_refusals_are_refusals():
    texts = load_refusals()
    assert texts and all(map(refuses, texts))


@pytest.mark.parametrize(
    "answer, right",
    [
        ("The capital of Kenya is Nairobi.", True),
        ("the capital is nairobi", True),
        ("Nairobians live there.", False),  # whole words
        ("It is Nairobi, not Lima.", False),
        ("It is Nairobi. Limassol is in Cyprus.", False),  # even within a word
        ("It is Lima.", False),
        ("", False),
    ],
)
def test_a_right_answer_to_a_stranger(answer, right):
    item = {"any": ["Nairobi", "the capital of Kenya's"], "none": ["Lima"]}
    assert strangers.right(item, answer) is right


def test_a_stranger_may_want_several_things():
    item = {"any": ["Kenya", "Peru", "Chad"], "at_least": 2}
    assert strangers.right(item, "Chad and Kenya.")
    assert not strangers.right(item, "Chad, Chad and again Chad.")
    assert strangers.right({"any": ["don't know"], "none": []}, "I don’t know.")


def test_short_phrases_of_a_stranger_need_their_capitals():
    assert strangers.right({"any": ["I"]}, "Its symbol is I.")
    assert not strangers.right({"any": ["I"]}, "i think so")
    assert not strangers.right({"any": ["Au"]}, "AU is short for au pair.")


QUIZ = ["What is it?", "A) Lima", "B) Nairobi", "C) Paris", "D) Quito", "Answer: B) Nairobi"]
GOOD = {"different", "of_kind", "has_right", "consistent"}


@pytest.mark.parametrize(
    "item, lines, good",
    [
        (KENYA, {}, GOOD),
        (KENYA, {4: "D) Lima"}, GOOD - {"different"}),
        (KENYA, {4: "D) euro"}, GOOD - {"of_kind"}),
        (KENYA, {2: "B) Rome"}, GOOD - {"has_right", "consistent"}),
        (KENYA, {2: "B) Rome", 5: "Answer: B) Rome"}, GOOD - {"has_right"}),
        (KENYA, {5: "Answer: A) Nairobi"}, GOOD - {"consistent"}),
        (KENYA, {5: "Answer: B) Nairob"}, GOOD - {"consistent"}),
        (KENYA, {5: "The answer is Nairobi."}, GOOD - {"consistent"}),
        (KENYA, {4: ""}, set()),  # three options
        (KENYA, {3: "D) Paris", 4: "C) Quito"}, set()),  # in another order
        (KENYA, {5: "Answer: B) Nairobi\nAnd?\nA) Rome"}, GOOD),  # the next quiz doesn't count
        (SEASONS, {}, {"different", "consistent"}),
        (
            SEASONS,
            {
                1: "A) its distance",
                2: "B) its speed",
                3: "C) its tilt",
                4: "D) its size",
                5: "Answer: C) its tilt",
            },
            GOOD,
        ),
        (SEASONS, {1: "A) its tilt"}, GOOD - {"of_kind"}),
    ],
)
def test_how_good_a_quiz_is(item, lines, good, scorer):
    quiz = "\n".join(lines.get(i, line) for i, line in enumerate(QUIZ))
    found = scorer.quiz(item, quiz)
    assert {key for key, value in found.items() if value} == good
    assert found.keys() == GOOD


def test_an_answer_is_no_quiz(scorer):
    for text in ("", "The capital of Kenya is Nairobi."):
        assert not any(scorer.quiz(KENYA, text).values())


@pytest.mark.parametrize(
    "item, text, known",
    [
        (KENYA, " Nairobi. The capital of Peru is Lima.", True),
        (KENYA, " Lima. Nairobi", False),
        (KENYA, " Nairobis", False),
        ({**KENYA, "accept": ["euro"]}, " the euro.", True),
        ({**KENYA, "accept": ["owl", "owlet"]}, " an owlet", True),
    ],
)
def test_what_counts_as_knowing(item, text, known, scorer):
    assert scorer.knows(item, text) is known


@functools.cache
def make_tokenizer(name):
    return Tokenizer.train([Path(__file__).with_name(name).read_text(encoding="utf-8")], 280)


def make_model(text="test_compare.py", block_size=32):
    torch.manual_seed(0)
    tokenizer = make_tokenizer(text)
    sizes = dict(n_layer=1, n_head=2, n_embd=32, dropout=0.0)
    model = GPT(GPTConfig(block_size=block_size, vocab_size=tokenizer.n_vocab, **sizes)).eval()
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.3)
    return model, tokenizer


def write(path, model, tokenizer, **about):
    save(Checkpoint(path, model, tokenizer, about))


@pytest.fixture(scope="module")
def pair():
    return make_model()


def test_a_checkpoint_comes_back(pair, tmp_path):
    model, tokenizer = pair
    trained_on = {"files": ["a b.txt"]}
    write(tmp_path / "base.pt", model, tokenizer, stage="base", trained_on=trained_on)
    model2, tokenizer2 = load(tmp_path / "base.pt")
    ids = torch.tensor([tokenizer.encode("the cat sat")])
    assert torch.equal(model2(ids)[0], model(ids)[0]) and not model2.training
    assert model2.embed.weight is model2.head.weight
    assert tokenizer2.encode("the cat 고양이 🦜") == tokenizer.encode("the cat 고양이 🦜")
    assert torch.load(tmp_path / "base.pt", weights_only=True)["trained_on"] == trained_on
    assert not (tmp_path / "base.pt.tmp").exists()


class Payload:
    def __reduce__(self):
        return (open, ("gotcha", "w"))


def test_a_checkpoint_is_data_and_nothing_else(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"format": FORMAT, "config": Payload()}, tmp_path / "base.pt")
    with pytest.raises(InputError, match="not a readable checkpoint"):
        load(tmp_path / "base.pt")
    assert not (tmp_path / "gotcha").exists()


def test_completions(pair):
    model, tokenizer = pair
    prompts = ["the", "the cat sat on", "<|end|><|user|>", "mat"]
    texts = respond(model, tokenizer, prompts, max_new_tokens=10)
    assert texts == [respond(model, tokenizer, [p], max_new_tokens=10)[0] for p in prompts]
    chat = [tokenizer.user, *tokenizer.encode("the"), tokenizer.end, tokenizer.assistant]
    new = model.generate([chat], 10, temperature=0, stop=tokenizer.end)[0]
    expected = tokenizer.decode([i for i in new if i != tokenizer.end]), tokenizer.end in new
    assert complete(model, tokenizer, ["the"], max_new_tokens=10)[0] == expected
    document = [tokenizer.endoftext, *tokenizer.encode("the")]
    new = model.generate([document], 10, temperature=0, stop=tokenizer.endoftext)[0]
    expected = tokenizer.decode([i for i in new if i != tokenizer.endoftext])
    assert respond(model, tokenizer, ["the"], chat=False, max_new_tokens=10)[0] == expected


def test_a_prompt_may_be_a_conversation(pair, monkeypatch):
    model, tokenizer = pair  # with a block of 32
    read, generate = [], model.generate

    def look(rows, *args):
        read.extend(rows)
        return generate(rows, *args)

    monkeypatch.setattr(model, "generate", look)
    system, *turns = [
        {"role": role, "content": text}
        for role, text in (
            *(("system", "s"), ("user", "a"), ("assistant", "b")),
            *(("user", "c"), ("assistant", "d"), ("user", "e")),
        )
    ]
    for new, prompt, kept in (
        (1, [system, *turns], [system, *turns]),
        (1, turns, turns),
        (1, "e", turns[4:]),
        (14, [system, *turns], [system, *turns[2:]]),  # the oldest turns make room for the answer
        (20, [system, *turns], [system, *turns[4:]]),
        (99, [system, *turns], [system, *turns[4:]]),  # and what was said last stays
    ):
        read.clear()
        respond(model, tokenizer, [prompt], max_new_tokens=new)
        assert read == [encode_chat(kept, tokenizer)[0]], new


def test_other_programs_find_load_and_respond_in_compare():
    assert compare.load is load and compare.respond is respond


def test_text_loss_is_over_every_token_but_the_first(pair):
    model, tokenizer = pair
    text = "the cat sat on the mat. " * 30
    tokens = np.array([tokenizer.endoftext, *tokenizer.encode(text)])
    nats, bits = text_loss(model, tokens, tokenizer)
    T, losses = 32, []
    for start in range(0, len(tokens) - T + 1, T - 1):
        ids = torch.from_numpy(tokens[start : start + T])[None]
        logits = model(ids, ids)[0].log_softmax(-1)
        losses += [-logits[t, ids[0, t + 1]].item() for t in range(T - 1)]
    assert len(tokens) - T < len(losses) < len(tokens)  # the rest doesn't fill a row
    assert nats == pytest.approx(sum(losses) / len(losses), rel=1e-5)
    n_bytes = len(tokenizer.decode(tokens[1 : len(losses) + 1].tolist()))
    assert bits == pytest.approx(sum(losses) / 0.6931472 / n_bytes, rel=1e-5)


# -------------------------------------------------------------------------------------------------
# Scores


class Scripted:
    """Stands for a Checkpoint whose model says what a dict tells it to say, and then stops.

    answers: {prompt: answer}. An answer that ends in "..." goes on. Sampled, it says what stands
    under ("sampled", prompt), or else nothing. read: all prompts so far.
    """

    def __init__(self, answers, monkeypatch):
        self.model, self.tokenizer, self.answers, self.read = self, None, answers, []
        monkeypatch.setattr(scores, "complete", lambda model, *args, **kw: model.say(*args, **kw))
        monkeypatch.setattr(scores, "respond", lambda model, *args, **more: model.respond(*args))

    def say(self, tokenizer, prompts, *more, temperature=0.0, **rest):
        if temperature:
            return [(self.answers.get(("sampled", prompt), ""), True) for prompt in prompts]
        self.read += prompts
        return [
            (self.answers[p].removesuffix("..."), "..." not in self.answers[p]) for p in prompts
        ]

    def respond(self, tokenizer, prompts, chat=True, length=64):
        return [text for text, stopped in self.say(tokenizer, [(p, chat) for p in prompts])]


def test_the_mean_of_nothing_is_unknown():
    assert scores.share([True, False]) == 0.5 and scores.share([]) is None


def test_the_scores_of_a_tuned_model(scorer, monkeypatch):
    right, wrong = "The capital of Kenya is Nairobi.", "The capital of Kenya is Lima."
    refusal, free = "I don't know that.", "It is the tilt of the Earth's axis."
    pirate, kenya = asked_in("pirate", KENYA), {**KENYA, "prompt": "fact", "unseen": "fact 2"}
    concept = {"kind": "concept", "name": "gravity", "form": "child", "texts": TEXTS}
    questions = [
        kenya,
        {**KENYA, "prompt": "fact cut off", "unseen": "fact 2"},
        {**KENYA, "prompt": "fact wrong", "unseen": "fact refused"},
        {**SEASONS, "prompt": "free"},
        {**pirate, "prompt": "style", "unseen": "style 2"},
        {**pirate, "prompt": "style cut off", "unseen": "style 2"},
        {**concept, "prompt": "concept", "unseen": "concept 2"},
        {**ATLANTIS, "prompt": "unknown", "unseen": "unknown 2"},
        {**ATLANTIS, "prompt": "unknown 3", "unseen": "unknown 2"},
        {**ATLANTIS, "prompt": "unknown", "unseen": "unknown 3"},
    ]
    smalltalk = [
        {"prompt": "hi", "unseen": "hey", "response": "Hello."},
        {"prompt": "bye", "response": "Goodbye."},
    ]
    answers = {"fact": right, "fact cut off": right + "...", "fact wrong": wrong, "free": free}
    answers |= {
        "fact 2": right,
        "fact refused": refusal,
        "hi": "Hello.",
        "hey": "Hi.",
        "bye": "No.",
    }
    answers |= {"style": IN_STYLE["pirate"], "style cut off": IN_STYLE["pirate"] + "..."}
    answers |= {"style 2": right, "concept": TEXTS["child"], "concept 2": TEXTS["sentence"]}
    answers |= {"unknown": refusal, "unknown 2": refusal, "unknown 3": right}
    sampled = {("sampled", "fact wrong"): right, ("sampled", "fact"): wrong}
    tuned = Scripted({**answers, **sampled}, monkeypatch)
    assert scores.score_tuned(tuned, questions, [kenya, questions[8]], smalltalk, scorer) == {
        "answered": 2 / 4,
        "unseen": 2 / 3,
        "train": 1.0,
        "sampled": 1 / 4,
        "stops": 3 / 4,
        "smalltalk": 1 / 2,
        "smalltalk_unseen": 0.0,
        "refuses_known": 1 / 7,
        "style": 1 / 2,
        "style_unseen": 0.0,
        "concept": 1.0,
        "concept_unseen": 0.0,
        "unknown": 2 / 3,
        "unknown_unseen": 2 / 3,
    }
    assert set(tuned.read) == answers.keys()


def test_the_scores_of_a_base_model(scorer, monkeypatch):
    """It never stops, so we look at its first paragraph, or at its first line."""
    kenya = {**KENYA, "prompt": "fact", "faq": "Q: fact", "cloze": "Kenya's is"}
    seasons = {**SEASONS, "prompt": "free", "faq": "Q: free"}
    quiz, right = "\n".join(QUIZ[1:]), "The capital of Kenya is Nairobi."
    answers = {
        ("fact", False): f"\n{quiz}\n\nE",
        ("free", False): f"{right}\n\nWhy?",
        ("fact", True): f"{right}\n\nThe capital of Peru is Lima.",
        ("free", True): "A) the tilt of its axis",
        ("Q: fact", False): f" {right}\nQ: Is it Lima?",
        ("Q: free", False): " Its tilted axis.\nA) no",
        ("Kenya's is", False): " Nairobi. Lima",
    }
    base = Scripted(answers, monkeypatch)
    questions = [kenya, seasons, {**ATLANTIS, "prompt": "Who?"}, asked_in("word", kenya)]
    assert scores.score_base(base, questions, scorer) == {
        "plain": 0.0,
        "goes_on": 1 / 2,
        **dict.fromkeys(GOOD, 1 / 2),
        "chat": 1 / 2,
        "faq": 1.0,
        "knows": 1.0,
    }
    assert set(base.read) == answers.keys()


STRANGERS = [
    {"kind": "direct", "turns": ["Capital of Peru?"], "any": ["Lima"], "none": []},
    {"kind": "multi", "turns": ["Kenya?", "And Peru?", "Are you sure?"], "any": ["Lima"]},
    {"kind": "multi", "turns": ["Kenya?", "You are rude."], "any": ["Nairobi"]},
    {"kind": "unknown", "turns": ["Capital of Atlantis?"], "any": ["don't know"]},
]


def test_strangers_are_asked_turn_by_turn(monkeypatch):
    """What the model itself has said is the history. An empty answer becomes three dots."""
    said = {
        "Capital of Peru?": "Lima.",
        "Kenya?": " Nairobi.",
        "And Peru?": "  ",
        "Are you sure?": "I don't know that.",
        "You are rude.": "Nairobi is far.",
        "Capital of Atlantis?": "It is Lima.",
    }
    read = []

    def respond(model, tokenizer, prompts):
        read.append([[(m["role"], m["content"]) for m in messages] for messages in prompts])
        return [said[messages[-1]["content"]] for messages in prompts]

    monkeypatch.setattr(strangers, "load_strangers", lambda: STRANGERS)
    monkeypatch.setattr(scores, "respond", respond)
    tuned = Checkpoint(None, None, None, {})
    answers = [answer for item, answer in scores.ask_strangers(tuned)]
    assert answers == ["Lima.", "I don't know that.", "Nairobi is far.", "It is Lima."]
    read.clear()
    found = scores.score_strangers(tuned)
    assert found == {"direct": 1, "multi": 0.5, "unknown": 0, "in all": 0.5, "refuses": 1 / 3}
    first = [[("user", item["turns"][0])] for item in STRANGERS]
    kenya = [*first[1], ("assistant", "Nairobi.")]
    peru = [*kenya, ("user", "And Peru?")]
    last = [*peru, ("assistant", "..."), ("user", "Are you sure?")]
    assert read == [first, [peru, [*kenya, ("user", "You are rude.")]], [last]]


def test_the_strangers_can_all_be_asked_and_answered():
    items = strangers.load_strangers()
    assert len(items) == 300 and len({item["id"] for item in items}) == 300
    kinds = {item["kind"] for item in items}
    assert set(strangers.KNOWN) < kinds and "unknown" in kinds
    for item in items:
        assert all(turn.strip() for turn in item["turns"]) and item["any"]
        answer = " ".join(item["any"])
        clash = [no for no in item.get("none", []) if no.lower() in answer.lower()]
        assert clash or strangers.right(item, answer), item
        assert not strangers.right(item, "Polly wants a cracker."), item


# -------------------------------------------------------------------------------------------------
# A pair of checkpoints


def write_pair(out, models=(None, None), base_about=None, **about):
    """Write base.pt and sft.pt, a pair that belongs together. Returns the Checkpoint of the base.

    models: (model, tokenizer) for each, untrained by default. about: more about the tuned one.
    """
    base = models[0] or make_model()
    tuned = models[1] or base
    base_about = {"stage": "base", "trained_on": {"files": ["a.txt"]}, **(base_about or {})}
    write(out / "base.pt", *base, **base_about)
    checkpoint = read_checkpoint(out / "base.pt")
    about = {"stage": "sft", "trained_on": {}, "base_sha256": checkpoint.sha256, **about}
    write(out / "sft.pt", *tuned, **about)
    return checkpoint


def run(out, *argv):
    compare.main(["--out", str(out), "--device", "cpu", *argv])


def error_of(capsys, out, *argv):
    """The one line with which compare.py refuses something."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stopped:
        run(out, *argv)
    lines = capsys.readouterr().err.splitlines()
    assert stopped.value.code == 2 and len(lines) == 1, lines
    return lines[0]


@pytest.mark.parametrize("relative", [True, False])
def test_the_base_model_is_found_where_sft_read_it(relative, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = Path("elsewhere") if relative else tmp_path / "elsewhere"
    out = tmp_path / "no_end"
    write_pair(out, base=str(folder / "base.pt"))
    folder.mkdir()
    shutil.move(out / "base.pt", folder / "base.pt")
    run(out, "--ask", "Who?")
    assert "BASE" in capsys.readouterr().out
    run(out)
    assert f"--chat --out {out}\n" in capsys.readouterr().out  # no --base needed here either

    shutil.move(folder / "base.pt", tmp_path / "moved.pt")
    error = error_of(capsys, out, "--chat")
    assert f"its base model is missing: no {folder / 'base.pt'}" in error and "--base" in error
    assert "pretrain" not in error
    run(out, "--ask", "Who?", "--base", str(tmp_path / "moved.pt"))
    assert "BASE" in capsys.readouterr().out
    run(out, "--base", str(tmp_path / "moved.pt"))
    assert f"--chat --out {out} --base {tmp_path / 'moved.pt'}\n" in capsys.readouterr().out


def test_a_pair_must_belong_together(tmp_path, capsys):
    write_pair(tmp_path)
    base, tuned = tmp_path / "base.pt", tmp_path / "sft.pt"
    load_stages(tmp_path)
    assert "this is a tuned model, but a base" in error_of(capsys, tmp_path, "--base", str(tuned))
    shutil.copy(base, tuned)
    assert "sft.pt: this is a base model, but a tuned" in error_of(capsys, tmp_path, "--ask", "a")
    write_pair(tmp_path, base_sha256="of another")
    said = error_of(capsys, tmp_path)
    assert f"sft.pt: was tuned from another base model, or {base} has changed" in said
    write_pair(tmp_path, models=(None, make_model("conftest.py")))
    assert f"sft.pt: its vocabulary differs from that of {base}" in error_of(capsys, tmp_path)
    write_pair(tmp_path, base=5)
    base.unlink()
    assert "its base model is missing" in error_of(capsys, tmp_path)
    tuned.unlink()
    assert "make it with python pretrain.py" in error_of(capsys, tmp_path)


def test_the_control_is_shown_with_its_base_model_only(tmp_path):
    base = write_pair(tmp_path)
    assert list(with_control(load_stages(tmp_path))) == ["base", "tuned"]
    shutil.copy(tmp_path / "sft.pt", tmp_path / "random.pt")
    assert list(with_control(load_stages(tmp_path))) == ["base", "tuned", "random"]
    about = {"stage": "sft", "trained_on": {}, "base_sha256": "of another"}
    write(tmp_path / "random.pt", base.model, base.tokenizer, **about)
    assert list(with_control(load_stages(tmp_path))) == ["base", "tuned"]


@pytest.mark.parametrize("blocks", [(8, 8), (64, 8), (8, 64)])
def test_a_small_block_is_enough(blocks, tmp_path, capsys):
    """Prompts, conversations and texts are longer than the block of one model, or of both."""
    models = [make_model(block_size=block_size) for block_size in blocks]
    text = "Why is the sky blue on a clear day? " * 20
    ids = [models[0][1].endoftext, *models[0][1].encode(text)]
    (tmp_path / "val.bin").write_bytes(np.array(ids, "<u2").tobytes())
    (tmp_path / "val.sha256").write_text(
        stamp(tmp_path / "val.bin", "of this text"), encoding="utf-8"
    )
    write_pair(tmp_path, models, {"text_sha256": "of this text"}, examples=["a", text])
    run(tmp_path)
    results = json.loads((tmp_path / "comparison.json").read_text(encoding="utf-8"))
    assert len(results["conversation"]["tokens"]) == 8
    assert results["tuned"]["val_bpb"] > 0
    run(tmp_path, "--ask", text)
    assert "BASE" in capsys.readouterr().out


@pytest.mark.parametrize(
    "found", [b"of another text {}", b"of this text 1", b"\xff\xfe", b"", b"of this text"]
)
def test_a_validation_text_of_another_run_is_not_scored(found, tmp_path):
    model, tokenizer = make_model()
    val_path = tmp_path / "val.bin"
    val_path.write_bytes(np.array(tokenizer.encode("the cat " * 50), "<u2").tobytes())
    right = stamp(val_path, "of this text").encode()
    others = found.replace(b"{}", right.removeprefix(b"of this text "))
    val_path.with_suffix(".sha256").write_bytes(others)
    write_pair(tmp_path, base_about={"text_sha256": "of this text"})
    assert "base" not in compare.compare(load_stages(tmp_path))
    val_path.with_suffix(".sha256").write_bytes(right)
    assert "val_bpb" in compare.compare(load_stages(tmp_path))["base"]


def test_it_says_that_there_is_no_validation_text(tmp_path, capsys):
    write_pair(tmp_path)
    run(tmp_path)
    said = f"Without losses on plain text: {tmp_path / 'val.bin'} is missing, or was made from"
    assert said in capsys.readouterr().out


# -------------------------------------------------------------------------------------------------
# What is shown


@pytest.fixture
def terminal(monkeypatch):
    """A function that makes the output a terminal of the given width."""

    def set_width(columns):
        monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
        monkeypatch.setenv("COLUMNS", str(columns))

    return set_width


EXAMPLE = {
    "prompt": "What is the primary cause of Earth's seasons?",
    "base": "A) The tilt of the Earth's axis relative to its orbital plane.\nB) Its distance.",
    "tuned": " The primary cause of Earth's seasons is the tilt of the Earth's axis.",
}


def test_side_by_side_fits_its_width():
    left = "A) one\nB) two\n\n" + "long " * 30
    for width in (70, 80, 100):
        lines = side_by_side([left, "The answer is " + "short " * 20], width)
        assert all(len(line) <= width for line in lines)
        assert all(" | " in line + " " for line in lines)
        assert lines[0].startswith("A) one ") and "The answer" in lines[0]


@pytest.mark.parametrize("columns, used", [(None, 80), (70, 70), (80, 80), (100, 100), (200, 100)])
def test_two_columns_fill_the_terminal(columns, used, terminal, capsys):
    if columns:
        terminal(columns)
    show_examples([EXAMPLE])
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) == used == len(lines[1])
    assert lines[0].split() == ["BASE", "|", "TUNED"]
    (first,) = [line for line in lines if " | The primary" in line]  # without its space
    assert first.startswith("  A) The tilt")


@pytest.mark.parametrize("columns", [40, 60, 69])
def test_a_narrow_terminal_shows_one_below_the_other(columns, terminal, capsys):
    terminal(columns)
    show_examples([EXAMPLE])
    out = capsys.readouterr().out
    lines = out.splitlines()[:-1]  # the remark at the end may wrap
    assert max(map(len, lines)) <= columns and "|" not in out
    labels = [line.strip() for line in lines if line.strip() in ("BASE", "TUNED")]
    assert labels == ["BASE", "TUNED"]
    words = " ".join(out.split())
    assert "BASE A) The tilt of the Earth's axis relative to its orbital plane. B) Its" in words
    assert "TUNED The primary cause of Earth's seasons is the tilt of the Earth's axis." in words


SCORES = {
    "side": "test",
    "questions": 560,
    "base": {"plain": 0.0, "faq": 0.98, "chat": 1.0, "goes_on": 1.0, "knows": 1.0, "val_bpb": 0.5},
    "tuned": {
        **{"answered": 1.0, "unseen": 1.0, "train": 1.0, "smalltalk_unseen": None, "stops": 1.0},
        "strangers": {"direct": 0.75, "in all": 0.625, "refuses": 0.25},
    },
}


@pytest.mark.parametrize("control", [True, False])
@pytest.mark.parametrize("columns", [60, 80, None])
def test_the_scores_fit_the_terminal(columns, control, terminal, capsys):
    if columns:
        terminal(columns)
    scores = {**SCORES, "random": {**SCORES["tuned"], "answered": 0.125}} if control else SCORES
    show_scores(scores)
    out = capsys.readouterr().out
    assert max(map(len, out.splitlines())) <= (columns or 80)
    table = [line.split() for line in out.splitlines()]
    assert ["base", "tuned", *["control"] * control] in table
    shares = ["100.0%", "100.0%", *["12.5%"] * control]
    assert ["answers", "it", "in", "the", "chat", "template", *shares] in table
    assert ["what", "strangers", "typed", "-", *["62.5%"] * len(shares[1:])] in table
    words = " ".join(out.split())  # we say how the control differs, and no more
    assert "random weights" in words and "read nothing" not in words
    heading, rows = score_table(scores)
    assert "560 held-out test questions" in heading and len({len(row) for row in rows}) == 1


def cells(results):
    """The cells of the table of scores."""
    return [cell for row in score_table(results)[1] for cell in row]


def test_nothing_is_computed_for_nobody(small_world):
    """Every score is in the table, or is that of a row in the wordings that we trained on."""
    results = json.loads((small_world / "comparison.json").read_text(encoding="utf-8"))
    for name in ("base", "tuned"):
        for key in results[name].keys() - {"val_loss", "strangers"}:  # the loss is in the logs
            shown = cells({**results, name: {**results[name], key: 4.567}})
            assert {"4.567", "456.7%"} & set(shown) or f"{key}_unseen" in results[name], key
    kinds = results["tuned"]["strangers"]
    for kind in kinds:
        marked = {**results["tuned"], "strangers": {**kinds, kind: 4.567}}
        assert cells({**results, "tuned": marked}).count("456.7%") == 1, kind


def test_the_examples_suit_what_the_models_have_read(tmp_path):
    write_pair(tmp_path)
    prompts = [e["prompt"] for e in compare.compare(load_stages(tmp_path))["examples"]]
    assert prompts == compare.GREETINGS
    write_pair(tmp_path, base_about={"trained_on": {"world": 1}}, examples=[])
    prompts = [e["prompt"] for e in compare.compare(load_stages(tmp_path))["examples"]]
    assert prompts == compare.EXAMPLES
    write_pair(tmp_path, examples=["My own?"])
    prompts = [e["prompt"] for e in compare.compare(load_stages(tmp_path))["examples"]]
    assert prompts == ["My own?"]
