"""What must hold for every text and every conversation: thousands at random, from fixed seeds."""

import random

import pytest
import torch

from data import Tokenizer, encode_chat
from data.tokenizer import CAPS_LOCK, SHIFT, SPECIAL
from sft import encode, sft_data_collator

TEXT = "The capital of Kenya is Nairobi. What is the capital of Peru? 서울은 대한민국의 수도이다. "
BITS = ["the", " the", "Kenya", " ", "  ", "\n", "\n\n", "\r\n", "\t", "?", "!?", "...", "'s"]
BITS += ["'", '"', "1", "1905", "3.14", "a", "é", "e\u0301", "ß", "ñ", "가", "서울은", "漢字"]
BITS += ["ひらがな", "العربية", "עברית", "🦜", "👩‍👩‍👧", "🇰🇪"]
BITS += ["\u200b", "\u00a0", "\u2028", "\u0000", "\ufeff", "\ufffd", "\U0010ffff"]
BITS += [*SPECIAL, "<|", "|>", "<|endof"]
BITS += ["KENYA", " USA", "A", "iPhone", "McX", "Éa", SHIFT, CAPS_LOCK, SHIFT + "k"]


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.train([TEXT * 5], 320)


def random_character(rng):
    """Any character of Unicode except surrogates, often a simple one."""
    ranges = ((0, 128), (0, 0x800), (0, 0xD800), (0xE000, 0x110000))
    return chr(rng.randrange(*rng.choice(ranges)))


def random_text(rng):
    """Some of the bits above, or any characters."""
    if rng.random() < 0.5:
        return "".join(rng.choices(BITS, k=rng.randint(0, 12)))
    return "".join(random_character(rng) for _ in range(rng.randint(0, 20)))


def random_words(rng):
    """Like random_text, but never blank."""
    while not (text := random_text(rng)).strip():
        pass
    return text


def random_messages(rng):
    """A conversation of one to four turns, sometimes with a system message."""
    roles = ["system"] if rng.random() < 0.3 else []
    roles += ["user", "assistant"] * rng.randint(1, 4)
    return [{"role": role, "content": random_words(rng)} for role in roles]


def test_texts_come_back(tokenizer):
    rng = random.Random(1)
    for _ in range(5000):
        text = random_text(rng)
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text
        assert all(0 <= i < tokenizer.endoftext for i in ids)
        assert tokenizer.encode_to_array(text).tolist() == ids
        assert tokenizer.count_bytes(ids) == len(text.encode("utf-8"))


def test_conversations_are_laid_out_as_the_template_says(tokenizer):
    """The ids alone tell who speaks, what is said, and what of it is supervised."""
    rng, t = random.Random(2), tokenizer
    for _ in range(2000):
        messages = random_messages(rng)
        ids, supervised = encode_chat(messages, t)
        assert len(ids) == len(supervised)
        assert set(ids) <= set(range(t.n_vocab)) - {t.pad, t.endoftext}
        if messages[0]["role"] == "system":
            system, first, *rest = messages
            both = system["content"] + "\n\n" + first["content"]
            messages = [{"role": "user", "content": both}, *rest]
        at = 0
        for message in messages:
            end, by_assistant = ids.index(t.end, at), message["role"] == "assistant"
            assert ids[at] == (t.assistant if by_assistant else t.user)
            assert t.decode(ids[at + 1 : end]) == message["content"]
            assert supervised[at : end + 1] == [False] + [by_assistant] * (end - at)
            at = end + 1
        assert at == len(ids)


def test_what_the_model_is_asked_is_what_it_was_trained_on(tokenizer):
    """A conversation without its last answer gives the first tokens of the whole one."""
    rng = random.Random(3)
    for _ in range(1000):
        messages = random_messages(rng)
        whole, _ = encode_chat(messages, tokenizer)
        asked, _ = encode_chat(messages[:-1], tokenizer)
        assert whole[: len(asked)] == asked and asked[-1] == tokenizer.assistant


def test_batches(tokenizer):
    rng, t = random.Random(4), tokenizer
    for _ in range(500):
        talks = [{"messages": random_messages(rng)} for _ in range(rng.randint(1, 6))]
        batch = sft_data_collator(talks, t)
        encoded = [encode_chat(talk["messages"], t) for talk in talks]
        T = max(len(ids) for ids, _ in encoded)
        assert batch.keys() == {"input_ids", "labels"}
        for tensor in batch.values():
            assert tensor.dtype == torch.int64 and tensor.shape == (len(talks), T)
        for row, (ids, supervised) in enumerate(encoded):
            labels = [i if s else -100 for i, s in zip(ids, supervised, strict=True)]
            n_pad = T - len(ids)
            assert batch["input_ids"][row].tolist() == ids + [t.pad] * n_pad
            assert batch["labels"][row].tolist() == labels + [-100] * n_pad


def test_what_is_cut_to_fit(tokenizer):
    """Never longer than the block. It keeps whole turns, the newest, and as many as fit."""
    rng = random.Random(5)
    for _ in range(1000):
        messages, block_size = random_messages(rng), rng.randint(4, 120)
        system = messages[:1] if messages[0]["role"] == "system" else []
        turns = messages[len(system) :]
        shorter = [system + turns[i:] for i in range(0, len(turns), 2)]  # the longest comes first
        options = [encode({"messages": option}, tokenizer) for option in shorter]
        row = encode({"messages": messages}, tokenizer, block_size)
        fitting = [option for option in options if len(option["input_ids"]) <= block_size]
        assert row == (fitting[0] if fitting else None)
        assert row is None or row["input_ids"][-1] == row["labels"][-1] == tokenizer.end
