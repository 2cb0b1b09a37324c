"""From text to token ids: the tokenizer, the chat template, and rows of text."""

import itertools
import random
import re
from pathlib import Path

import numpy as np
import pytest
import tiktoken
import torch

from common import files
from common.messages import InputError
from data import Tokenizer, encode_chat
from data.text import Rows, Text, open_tokens, survey, write_tokens
from data.tokenizer import CAPS_LOCK, SHIFT, SPECIAL, mark_capitals, unmark_capitals

TEXTS = [Path(__file__).read_text(encoding="utf-8"), "고양이가 매트 위에 앉았다. " * 20]
ALPHABETS = ["abc XYZ", "0123456789", " \t\n\r", "가나다라한국어", "é ñ ü ß", "🙂🦜👩‍👩‍👧"]
ALPHABETS += ["<|end|>", "<|user|>", "?!.,;:'\"", "\u200b\u0000\ufffd"]
ALPHABETS += ["aAbB ", f"aAB {SHIFT}{CAPS_LOCK}.", "ÀÉßñÑ Ж"]


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.train(TEXTS, 330)


def random_text(rng):
    parts = []
    for _ in range(rng.randint(0, 60)):
        letter = rng.choice(rng.choice(ALPHABETS))
        parts.append(letter if rng.random() < 0.9 else rng.choice(SPECIAL))
    return "".join(parts)


# The tokenizer


def test_every_string_comes_back(tokenizer):
    rng = random.Random(0)
    texts = ["", " ", "한국어도 됩니다", "emoji 🦜🦜", "\n\n\n", "a" * 10_000]
    for text in [*texts, *(random_text(rng) for _ in range(2000))]:
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text
        assert all(0 <= i < tokenizer.endoftext for i in ids)  # text never becomes a special token
        assert tokenizer.encode_to_array(text).tolist() == ids
        assert tokenizer.count_bytes(ids) == len(text.encode("utf-8"))


@pytest.mark.parametrize(
    "text, marked",
    [
        ("Kenya", "⇧kenya"),
        ("in Kenya", "in⇧ kenya"),
        ("the USA.", "the⇪ usa."),
        ("USAs iPhone", "⇧u⇧s⇧as i⇧phone"),
        ("A B", "⇧a⇧ b"),
        ("ÉA", "É⇧a"),  # only the letters A to Z have marks
        ("⇧a ⇪", "⇧⇧a ⇧⇪"),  # a mark in the text
        ("⇧A", "⇧⇧⇧a"),
    ],
)
def test_capitals_become_marks(text, marked):
    signs = str.maketrans("⇧⇪", SHIFT + CAPS_LOCK)
    text, marked = text.translate(signs), marked.translate(signs)
    assert mark_capitals(text) == marked
    assert unmark_capitals(marked.encode("utf-8")) == text.encode("utf-8")


def test_a_word_is_one_token_in_any_case():
    tokenizer = Tokenizer.train(["in kenya, in Kenya, in KENYA, " * 20], 267)
    shift, caps_lock = ord(SHIFT), ord(CAPS_LOCK)
    [kenya] = tokenizer.encode(" kenya")
    assert tokenizer.encode(" Kenya") == [shift, kenya]
    assert tokenizer.encode(" KENYA") == [caps_lock, kenya]
    # A model may write marks that no text has. They are left out.
    for ids, text in (
        ([shift], ""),
        ([caps_lock, shift, kenya, caps_lock], " Kenya"),
        ([shift, *tokenizer.encode("1é")], "1é"),
        ([shift, "é".encode()[0]], "\ufffd"),
    ):
        assert tokenizer.decode(ids) == text
        assert tokenizer.count_bytes(ids[:1]) == 0


def test_bytes_are_those_of_the_text_also_if_a_token_holds_a_mark():
    text = 'He said: "Yes" (No). ' * 50
    tokenizer = Tokenizer.train([text], 276)
    inside = [token for token in tokenizer.merges[256:] if SHIFT.encode() in token]
    ids = tokenizer.encode(text)
    assert inside and tokenizer.count_bytes(ids) == len(text)
    ids += [tokenizer.endoftext, tokenizer.pad, *ids]
    assert tokenizer.count_bytes(np.array(ids, dtype=np.uint16)) == 2 * len(text)


def test_merges_are_those_of_a_plain_implementation():
    """Byte-pair encoding as in its paper: for every merge, we count all pairs again."""
    text = "the cat sat on the mat, and another cat thought that mats are there for the cats " * 3
    words = re.findall(r" ?[a-z]+| ?[^\sa-z]+|\s+", text)
    words = [[bytes([b]) for b in word.encode()] for word in words]
    expected = []
    while len(expected) < 20:
        counts = {}
        for word in words:
            for pair in itertools.pairwise(word):
                counts[pair] = counts.get(pair, 0) + 1
        most = max(counts.values())
        tied = {a + b for (a, b), n in counts.items() if n == most}
        merged = Tokenizer.train([text], 261 + len(expected) + 1).merges[-1]
        assert merged in tied  # any of the most frequent pairs will do
        pair = next(p for p, n in counts.items() if n == most and p[0] + p[1] == merged)
        expected.append(merged)
        for word in words:
            i = 0
            while i < len(word) - 1:
                if (word[i], word[i + 1]) == pair:
                    word[i : i + 2] = [merged]
                i += 1
    assert Tokenizer.train([text], 281).merges[256:] == expected


def test_special_tokens_are_reserved(tokenizer):
    assert tokenizer.n_vocab == 330
    ids = [tokenizer.endoftext, tokenizer.user, tokenizer.assistant, tokenizer.end, tokenizer.pad]
    assert ids == list(range(325, 330))
    assert [tokenizer.decode([i]) for i in ids] == list(SPECIAL)
    assert len(tokenizer.encode("<|end|>")) > 1


def test_a_question_mark_is_the_same_token_in_text_and_in_a_prompt():
    tokenizer = Tokenizer.train(["What is it?\nA) this\nWhat is that?\nA) that\n" * 50], 270)
    inside, alone = tokenizer.encode("What is it?\nA)"), tokenizer.encode("What is it?")
    assert inside[: len(alone)] == alone


def test_very_long_runs(tokenizer):
    for text in (" " * 3_000_000, "a" * 3_000_000, "\n" * 100_000 + "x", "가" * 300_000):
        assert tokenizer.decode(tokenizer.encode(text)) == text


def test_learning_from_a_text_without_spaces():
    """Each merge takes as long as the words that hold it, so a long word is learned in parts."""
    text = "".join(random.Random(0).choices("acgt", k=200_000))
    tokenizer = Tokenizer.train([text], 600)
    assert tokenizer.n_vocab == 600 and tokenizer.decode(tokenizer.encode(text)) == text
    assert max(map(len, tokenizer.merges)) <= 32
    assert len(tokenizer.encode(text)) < 0.3 * len(text)


def test_vocabulary_sizes_that_cannot_be():
    with pytest.raises(ValueError, match="261"):
        Tokenizer.train(TEXTS, 260)
    with pytest.raises(ValueError, match="supports"):
        Tokenizer.train(["abc"], 1000)
    assert Tokenizer.train([""], 261).decode(Tokenizer.train([""], 261).encode("é")) == "é"


def test_a_tokenizer_comes_back_from_its_state(tokenizer):
    again = Tokenizer.from_state(tokenizer.state())
    rng = random.Random(1)
    for text in [*TEXTS, *(random_text(rng) for _ in range(200))]:
        assert again.encode(text) == tokenizer.encode(text)
    assert (again.n_vocab, again.pad) == (tokenizer.n_vocab, tokenizer.pad)


def test_an_encoding_of_tiktokens_gets_our_special_tokens(monkeypatch):
    ranks = {bytes([b]): b for b in range(256)} | {b"th": 256, b"the": 257}
    pattern, special = r"\w+|\W+", {"<|endoftext|>": 258}
    small = tiktoken.Encoding(
        "small", pat_str=pattern, mergeable_ranks=ranks, special_tokens=special
    )
    monkeypatch.setattr(tiktoken, "get_encoding", {"small": small}.__getitem__)
    tokenizer = Tokenizer.named("small")
    assert tokenizer.encode("the <|end|>") == small.encode_ordinary("the <|end|>")
    assert tokenizer.n_vocab == 263
    assert [tokenizer.decode([i]) for i in range(258, 263)] == list(SPECIAL)
    again = Tokenizer.from_state(tokenizer.state())
    text = f"The THING {SHIFT}a{CAPS_LOCK}"  # it has no marks for capitals
    for one in (tokenizer, again):
        assert one.encode(text) == small.encode_ordinary(text)
        assert one.decode(one.encode(text)) == text
        assert one.count_bytes(one.encode(text)) == len(text)


# The chat template


def user(text):
    return {"role": "user", "content": text}


def assistant(text):
    return {"role": "assistant", "content": text}


def test_one_turn_token_by_token(tokenizer):
    t = tokenizer
    ids, supervised = encode_chat([user("the cat?"), assistant("sat on")], t)
    prompt, response = t.encode("the cat?"), t.encode("sat on")
    assert ids == [t.user, *prompt, t.end, t.assistant, *response, t.end]
    assert supervised == [False] * (len(prompt) + 3) + [True] * (len(response) + 1)


def test_an_open_conversation_ends_with_the_assistants_cue(tokenizer):
    t = tokenizer
    ids, supervised = encode_chat([user("a"), assistant("b"), user("c")], t)
    assert ids[-4:] == [t.user, *t.encode("c"), t.end, t.assistant]
    assert supervised[-4:] == [False] * 4


def test_a_system_message_joins_the_first_user_turn(tokenizer):
    system = {"role": "system", "content": "be brief"}
    joined = [user("be brief\n\na"), assistant("b")]
    asked = [system, user("a"), assistant("b")]
    assert encode_chat(asked, tokenizer) == encode_chat(joined, tokenizer)


def test_an_answer_of_weight_0_is_not_learned(tokenizer):
    """As in OpenAI's format: the model reads it, and the loss doesn't look at it."""
    talk = [user("a"), assistant("bb"), user("c"), assistant("dd")]
    ids, supervised = encode_chat(talk, tokenizer)
    plain, weighted = [sum(supervised)], [{**talk[1], "weight": 0}, {**talk[3], "weight": 1}]
    same_ids, fewer = encode_chat([talk[0], weighted[0], talk[2], weighted[1]], tokenizer)
    assert same_ids == ids and sum(fewer) == sum(encode_chat(talk[:2], tokenizer)[1]) < plain[0]
    assert fewer[len(ids) // 2 :] == supervised[len(ids) // 2 :]


@pytest.mark.parametrize(
    "messages, complaint",
    [
        ([], "at least one"),
        ("hello", "must be a list"),
        ([user("a"), user("b")], "take turns"),
        ([assistant("a")], "take turns"),
        ([user("a"), assistant(" ")], "must have text in it"),
        ([user("a"), assistant(5)], "text"),
        ([{"role": "robot", "content": "a"}], "unknown role"),
        ([{"role": "user"}], "content"),
        ([user("a"), {"role": "system", "content": "b"}, assistant("c")], "first"),
        ([{"role": "system", "content": "b"}], "user message"),
        (["a"], "object"),
        ([user("a"), {**assistant("b"), "weight": 0.5}], "message 2 has a weight other than 0"),
    ],
)
def test_malformed_conversations(messages, complaint, tokenizer):
    with pytest.raises(ValueError, match=complaint):
        encode_chat(messages, tokenizer)


# Rows of text


@pytest.mark.parametrize(
    "n, block_size", [(10, 10), (11, 10), (100, 10), (91, 10), (92, 10), (57, 8)]
)
def test_each_token_but_the_first_is_predicted_once_except_for_a_rest(n, block_size):
    rows = Rows(np.arange(n), block_size)
    input_ids = rows.take(range(len(rows)))
    assert input_ids.shape == (len(rows), block_size) and input_ids.dtype == torch.int64
    predicted = input_ids[:, 1:].flatten().tolist()
    assert predicted == list(range(1, 1 + len(predicted)))
    assert n - 1 - len(predicted) < block_size - 1  # less than what one more row predicts


def test_tokens_are_written_once_and_used_again(tokenizer, tmp_path):
    path, documents = tmp_path / "train.bin", [[TEXTS[0][:1000], TEXTS[0][1000:]], [TEXTS[1]]]
    write_tokens(documents, tokenizer, path, "both", 0)
    tokens = open_tokens(path, tokenizer)
    assert tokens.dtype == np.uint16
    start, encode = tokenizer.endoftext, tokenizer.encode
    first = [start, *encode(TEXTS[0][:1000]), *encode(TEXTS[0][1000:])]
    assert tokens.tolist() == [*first, start, *encode(TEXTS[1])]
    before = path.stat().st_mtime_ns
    write_tokens([["something else"]], tokenizer, path, "both", 0)
    assert path.stat().st_mtime_ns == before
    write_tokens([["something else"]], tokenizer, path, "else", 0)
    assert open_tokens(path, tokenizer).tolist() == [start, *encode("something else")]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["train.bin", "train.sha256"]


def test_texts_are_read_in_pieces(tmp_path, monkeypatch):
    """The pieces may cut a byte order mark, a line end, or a character of several bytes."""
    contents = ["\ufeffOne line.\r\nAnother.\r\n", "  \n", "고양이가 매트 위에 앉았다 🦜.", "last"]
    plain = ["One line.\nAnother.\n", "고양이가 매트 위에 앉았다 🦜.", "last"]
    paths = [tmp_path / f"{i} 이름.txt" for i in range(4)]
    for path, content in zip(paths, contents, strict=True):
        path.write_bytes(content.encode("utf-8"))
    hashes = set()
    for size in (1, 2, 3, 7, 1000):
        monkeypatch.setattr(files, "PIECE", size)
        found, sha256 = survey(paths)
        hashes.add(sha256)
        with_text = [paths[0], *paths[2:]]
        assert found == [(path, len(part)) for path, part in zip(with_text, plain, strict=True)]
        whole = "".join(plain)
        for start, end in [(0, len(whole)), (0, 20), (3, 25), (19, 21), (25, len(whole)), (5, 5)]:
            documents = Text(found, start, end)
            assert "".join(p for document in documents for p in document) == whole[start:end]
        assert ["".join(document) for document in Text(found, 0, len(whole))] == plain
    assert len(hashes) == 1
    paths[3].write_text("lost", encoding="utf-8")
    assert survey(paths)[1] not in hashes


def test_where_a_file_is_not_utf_8(tmp_path, monkeypatch):
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbf" + "고양이".encode() * 3 + b"caf\xe9 caf\xe9")
    for size in (1, 2, 5, 1000):
        monkeypatch.setattr(files, "PIECE", size)
        with pytest.raises(InputError, match=r"a.txt: not UTF-8 text \(byte 33\)"):
            survey([tmp_path / "a.txt"])


@pytest.mark.parametrize("damaged", [b"", b"\x01\x00\x02", b"\xff" * 400])
def test_a_file_of_tokens_that_was_cut_or_replaced_is_refused(damaged, tokenizer, tmp_path):
    path = tmp_path / "train.bin"
    write_tokens([TEXTS], tokenizer, path, "text", 0)
    path.write_bytes(damaged)
    with pytest.raises(InputError, match="train.bin: is damaged"):
        open_tokens(path, tokenizer)
