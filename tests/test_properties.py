"""What must hold for every text and every conversation, on thousands made at random from fixed seeds."""

import random

import pytest
import torch

from data import Tokenizer, encode_chat
from data.tokenizer import SPECIAL
from sft import encode, sft_data_collator

LEARNED_FROM = "The capital of Kenya is Nairobi. What is the capital of Peru? 서울은 대한민국의 수도이다. Thank you! " * 5
BITS = [
    "the", " the", "Kenya", " ", "  ", "\n", "\n\n", "\r\n", "\t", "?", "!?", "...", "'s", "'", '"', "1", "1905", "3.14", "a", "é", "e\u0301", "ß", "ñ", "가", "서울은",
    "漢字", "ひらがな", "العربية", "עברית", "🦜", "👩‍👩‍👧", "🇰🇪", "\u200b", "\u00a0", "\u2028", "\u0000", "\ufeff", "\ufffd", "\U0010ffff", *SPECIAL, "<|", "|>", "<|endof",
]  # fmt: skip


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.train([LEARNED_FROM], 320)


def random_text(rng):
    """Bits in a row, or any characters of Unicode but surrogates."""
    if rng.random() < 0.5:
        return "".join(rng.choices(BITS, k=rng.randint(0, 12)))
    points = (rng.choice((rng.randrange(128), rng.randrange(0x800), rng.randrange(0xD800), rng.randrange(0xE000, 0x110000))) for _ in range(rng.randint(0, 20)))
    return "".join(map(chr, points))


def random_words(rng):
    """Like random_text, but never blank."""
    while not (text := random_text(rng)).strip():
        pass
    return text


def random_messages(rng):
    messages = [{"role": role, "content": random_words(rng)} for _ in range(rng.randint(1, 4)) for role in ("user", "assistant")]
    return [{"role": "system", "content": random_words(rng)}, *messages] if rng.random() < 0.3 else messages


def test_texts_come_back(tokenizer):
    rng = random.Random(1)
    for _ in range(5000):
        text = random_text(rng)
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text and all(0 <= i < tokenizer.endoftext for i in ids)
        assert tokenizer.encode_to_array(text).tolist() == ids and tokenizer.count_bytes(ids) == len(text.encode("utf-8"))


def test_conversations_are_laid_out_as_the_template_says(tokenizer):
    """Read back from the ids alone: who speaks, what is said, and what of it is supervised."""
    rng, t = random.Random(2), tokenizer
    for _ in range(2000):
        messages = random_messages(rng)
        ids, supervised = encode_chat(messages, t)
        assert len(ids) == len(supervised) and set(ids) <= set(range(t.n_vocab)) - {t.pad, t.endoftext}
        if messages[0]["role"] == "system":
            system, first, *rest = messages
            messages = [{"role": "user", "content": system["content"] + "\n\n" + first["content"]}, *rest]
        at = 0
        for message in messages:
            end = ids.index(t.end, at)
            assistant = message["role"] == "assistant"
            assert ids[at] == (t.assistant if assistant else t.user) and t.decode(ids[at + 1 : end]) == message["content"]
            assert supervised[at : end + 1] == [False] + [assistant] * (end - at)
            at = end + 1
        assert at == len(ids)


def test_what_the_model_is_asked_is_what_it_was_trained_on(tokenizer):
    """A conversation that is open at its end is a beginning of the whole one, token by token, up to the assistant's cue."""
    rng = random.Random(3)
    for _ in range(1000):
        messages = random_messages(rng)
        whole, asked = encode_chat(messages, tokenizer)[0], encode_chat(messages[:-1], tokenizer)[0]
        assert whole[: len(asked)] == asked and asked[-1] == tokenizer.assistant


def test_batches(tokenizer):
    rng, t = random.Random(4), tokenizer
    for _ in range(500):
        talks = [{"messages": random_messages(rng)} for _ in range(rng.randint(1, 6))]
        batch = sft_data_collator(talks, t)
        ids, labels = batch["input_ids"], batch["labels"]
        assert batch.keys() == {"input_ids", "labels"} and ids.dtype == labels.dtype == torch.int64
        lengths = [len(encode_chat(talk["messages"], t)[0]) for talk in talks]
        assert ids.shape == labels.shape == (len(talks), max(lengths))
        for row, row_labels, n, talk in zip(ids.tolist(), labels.tolist(), lengths, talks):
            whole, supervised = encode_chat(talk["messages"], t)
            assert row == whole + [t.pad] * (len(row) - n)
            assert row_labels == [i if s else -100 for i, s in zip(whole, supervised)] + [-100] * (len(row) - n)


def test_what_is_cut_to_fit(tokenizer):
    """Never longer than the block; whole turns, the newest; as many as fit."""
    rng = random.Random(5)
    for _ in range(1000):
        messages, block_size = random_messages(rng), rng.randint(4, 120)
        row, whole = encode({"messages": messages}, tokenizer, block_size), encode({"messages": messages}, tokenizer)
        system = messages[:1] if messages[0]["role"] == "system" else []
        turns = messages[len(system) :]
        options = [encode({"messages": system + turns[i:]}, tokenizer) for i in range(0, len(turns), 2)]
        assert row == next((option for option in options if len(option[0]) <= block_size), None)
        assert row is None or (len(row[0]) <= block_size and row[0][-1] == row[1][-1] == tokenizer.end)
        assert len(whole[0]) > block_size or row == whole
