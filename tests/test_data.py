"""From text to token ids: the tokenizer, the chat template, rows of text, and the embedded world."""

import json
import random
import re
from pathlib import Path

import numpy as np
import pytest
import tiktoken

from data import Tokenizer, encode_chat, text, world
from data.terminal import InputError
from data.text import Rows, Text, open_tokens, survey, write_tokens
from data.tokenizer import SPECIAL

TEXTS = [Path(__file__).read_text(encoding="utf-8"), "고양이가 매트 위에 앉았다. " * 20]


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.train(TEXTS, 330)


@pytest.fixture(scope="module")
def made():
    return world.build(seed=3)


def random_text(rng):
    alphabet = ["abc XYZ", "0123456789", " \t\n\r", "가나다라한국어", "é ñ ü ß", "🙂🦜👩‍👩‍👧", "<|end|>", "<|user|>", "?!.,;:'\"", "\u200b\u0000\ufffd"]
    return "".join(rng.choice(rng.choice(alphabet)) if rng.random() < 0.9 else rng.choice(SPECIAL) for _ in range(rng.randint(0, 60)))


# The tokenizer


def test_every_string_comes_back(tokenizer):
    rng = random.Random(0)
    for text in ["", " ", "한국어도 됩니다", "emoji 🦜🦜", "\n\n\n", "a" * 10_000, *(random_text(rng) for _ in range(2000))]:
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text
        assert all(0 <= i < tokenizer.endoftext for i in ids)  # and no special token ever comes of text
        assert tokenizer.encode_to_array(text).tolist() == ids
        assert tokenizer.count_bytes(ids) == len(text.encode("utf-8"))


def test_merges_are_those_of_a_plain_implementation():
    """Byte-pair encoding as its paper tells it, counting everything anew for every merge."""
    text = "the cat sat on the mat, and another cat thought that mats are there for the cats that sit thereon " * 3
    words = [list(bytes([b]) for b in w.encode()) for w in re.findall(r" ?[a-z]+| ?[^\sa-z]+|\s+", text)]
    expected = []
    while len(expected) < 20:
        counts = {}
        for word in words:
            for pair in zip(word, word[1:]):
                counts[pair] = counts.get(pair, 0) + 1
        most = max(counts.values())
        pair = next(p for p in counts if counts[p] == most)
        tied = {a + b for (a, b), n in counts.items() if n == most}
        merged = Tokenizer.train([text], 261 + len(expected) + 1).merges[-1]
        assert merged in tied  # ties may be broken either way; follow the one it took
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
    small = tiktoken.Encoding("small", pat_str=r"\w+|\W+", mergeable_ranks=ranks, special_tokens={"<|endoftext|>": 258})
    monkeypatch.setattr(tiktoken, "get_encoding", {"small": small}.__getitem__)
    tokenizer = Tokenizer.named("small")
    assert tokenizer.encode("the <|end|>") == small.encode_ordinary("the <|end|>")
    assert tokenizer.n_vocab == 263 and [tokenizer.decode([i]) for i in range(258, 263)] == list(SPECIAL)
    assert Tokenizer.from_state(tokenizer.state()).encode("the thing") == small.encode_ordinary("the thing")


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
    assert ids[-4:] == [t.user, *t.encode("c"), t.end, t.assistant] and supervised[-4:] == [False] * 4


def test_a_system_message_joins_the_first_user_turn(tokenizer):
    system = {"role": "system", "content": "be brief"}
    assert encode_chat([system, user("a"), assistant("b")], tokenizer) == encode_chat([user("be brief\n\na"), assistant("b")], tokenizer)


@pytest.mark.parametrize(
    "messages, complaint",
    [
        ([], "at least one"),
        ("hello", "must be a list"),
        ([user("a"), user("b")], "take turns"),
        ([assistant("a")], "take turns"),
        ([user("a"), assistant(" ")], "not empty"),
        ([user("a"), assistant(5)], "text"),
        ([{"role": "robot", "content": "a"}], "unknown role"),
        ([{"role": "user"}], "content"),
        ([user("a"), {"role": "system", "content": "b"}, assistant("c")], "first"),
        ([{"role": "system", "content": "b"}], "user message"),
        (["a"], "object"),
    ],
)
def test_malformed_conversations(messages, complaint, tokenizer):
    with pytest.raises(ValueError, match=complaint):
        encode_chat(messages, tokenizer)


# Rows of text


@pytest.mark.parametrize("n, block_size", [(10, 10), (11, 10), (100, 10), (91, 10), (92, 10), (57, 8)])
def test_each_token_but_the_first_is_scored_exactly_once(n, block_size):
    rows = Rows(np.arange(n), block_size)
    batch = rows.batch(range(len(rows)))
    assert batch["input_ids"].shape == (len(rows), block_size)
    scored = batch["labels"][:, 1:]
    assert sorted(scored[scored != -100].tolist()) == list(range(1, n))
    kept = batch["labels"] != -100
    assert (batch["labels"][kept] == batch["input_ids"][kept]).all()


def test_tokens_are_written_once_and_used_again(tokenizer, tmp_path):
    path, documents = tmp_path / "train.bin", [[TEXTS[0][:1000], TEXTS[0][1000:]], [TEXTS[1]]]
    write_tokens(documents, tokenizer, path, "both", 0)
    tokens = open_tokens(path, tokenizer)
    assert tokens.dtype == np.uint16
    expected = [tokenizer.endoftext, *tokenizer.encode(TEXTS[0][:1000]), *tokenizer.encode(TEXTS[0][1000:]), tokenizer.endoftext, *tokenizer.encode(TEXTS[1])]
    assert tokens.tolist() == expected
    before = path.stat().st_mtime_ns
    write_tokens([["something else"]], tokenizer, path, "both", 0)
    assert path.stat().st_mtime_ns == before
    write_tokens([["something else"]], tokenizer, path, "else", 0)
    assert open_tokens(path, tokenizer).tolist() == [tokenizer.endoftext, *tokenizer.encode("something else")]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["train.bin", "train.sha256"]


def test_texts_are_read_in_pieces(tmp_path, monkeypatch):
    """As if they were read whole: byte order marks, line ends, characters of several bytes, parts by character."""
    contents = ["\ufeffOne line.\r\nAnother.\r\n", "  \n", "고양이가 매트 위에 앉았다 🦜.", "last"]
    plain = ["One line.\nAnother.\n", "고양이가 매트 위에 앉았다 🦜.", "last"]
    paths = [tmp_path / f"{i} 이름.txt" for i in range(4)]
    for path, content in zip(paths, contents):
        path.write_bytes(content.encode("utf-8"))
    hashes = set()
    for size in (1, 2, 3, 7, 1000):
        monkeypatch.setattr(text, "PIECE", size)
        files, sha256 = survey(paths)
        hashes.add(sha256)
        assert files == [(path, len(content)) for path, content in zip([paths[0], *paths[2:]], plain)]
        whole = "".join(plain)
        for start, end in [(0, len(whole)), (0, 20), (3, 25), (19, 21), (25, len(whole)), (5, 5)]:
            assert "".join(piece for document in Text(files, start, end) for piece in document) == whole[start:end]
        assert ["".join(document) for document in Text(files, 0, len(whole))] == plain
    assert len(hashes) == 1
    paths[3].write_text("lost", encoding="utf-8")
    assert survey(paths)[1] not in hashes


def test_where_a_file_is_not_utf_8(tmp_path, monkeypatch):
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbf" + "고양이".encode() * 3 + b"caf\xe9 caf\xe9")
    for size in (1, 2, 5, 1000):
        monkeypatch.setattr(text, "PIECE", size)
        with pytest.raises(InputError, match=r"a.txt: not UTF-8 text \(byte 33\)"):
            survey([tmp_path / "a.txt"])


# The embedded world


def test_the_tables_hold_what_is_promised():
    entities, free = world.load_facts()
    tables = {}
    for entity in entities:
        tables.setdefault(entity.table, []).append(entity)
        assert all(value == value.strip() and value for values in entity.values.values() for value in values)
    assert len(tables) >= 8 and len(entities) >= 500 and sum(len(e.values) for e in entities) >= 1500 and len(free) >= 100
    assert len({e.name for e in entities}) == len(entities) and len({q.name for q in free}) == len(free)
    continents = [e.values["continent"][0] for e in tables["countries"]]
    assert {c: continents.count(c) for c in set(continents)} == {
        "Africa": 54, "Asia": 47, "Europe": 43, "North America": 23, "Oceania": 14, "South America": 12
    }  # fmt: skip
    assert [e.values["number"][0] for e in tables["elements"]] == [str(n) for n in range(1, 119)]
    assert len({e.values["symbol"][0] for e in tables["elements"]}) == 118
    assert len(tables["planets"]) == 8
    for q in free:
        assert len(q.names) == 3 and len(q.retellings) == 2 and len(q.wrong) == 3 and q.names[0].endswith("?")
        for text in [q.answer, *q.retellings]:
            assert all(world.pattern_of(phrases).search(text) for phrases in q.keys), (q.name, text)
        for text in q.wrong:
            assert not all(world.pattern_of(phrases).search(text) for phrases in q.keys), (q.name, text)


def test_every_attribute_has_wordings_of_every_kind():
    entities, _ = world.load_facts()
    wordings = world.load_wordings()
    assert set(wordings) == {(e.table, a) for e in entities for a in e.values}
    for key, uses in wordings.items():
        assert {"state", "answer", "ask", "request", "unseen", "cloze"} <= set(uses), key
        assert len(uses["state"]) >= 5 and set(uses["answer"]) <= set(uses["state"]), key
        assert not set(uses["unseen"]) & {t for use in uses for t in uses[use] if use != "unseen"}, key


def test_the_same_seed_makes_the_same_bytes(made, tmp_path):
    world.write(made, tmp_path / "a")
    world.write(world.build(seed=3), tmp_path / "b")
    names = sorted(path.name for path in (tmp_path / "a").iterdir())
    assert names == ["corpus.txt", "dev.jsonl", "sft.jsonl", "sha256", "smalltalk.jsonl", "test.jsonl", "train.jsonl", "val.txt"]
    for name in names:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    assert world.build(seed=4)["corpus"] != made["corpus"]


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_held_out_entities_are_nowhere_in_the_fine_tuning_set(seed, tmp_path):
    """Read from the files, as whole words, in capitals or not."""
    world.write(world.build(seed), tmp_path)
    text = (tmp_path / "sft.jsonl").read_text(encoding="utf-8")
    texts = "\n".join(m["content"] for line in text.splitlines() for m in json.loads(line)["messages"])
    lower = texts.lower()
    entities, _ = world.load_facts()
    names = {e.name: e.names for e in entities}
    asked = {}
    for side in ("dev", "test"):
        asked[side] = [json.loads(line) for line in (tmp_path / f"{side}.jsonl").read_text(encoding="utf-8").splitlines()]
        for item in asked[side]:
            for name in names.get(item["name"], [item["name"]]):
                bare = re.sub("^the ", "", name, flags=re.IGNORECASE)
                if bare.lower() in lower:  # (looking for whole words in all texts takes long)
                    assert not re.search(rf"(?<!\w){re.escape(bare)}(?!\w)", texts, re.IGNORECASE), name
            assert item["prompt"] not in texts and item["response"] not in texts
    assert not {i["name"] for i in asked["dev"]} & {i["name"] for i in asked["test"]}
    assert "I am Parrot" in texts  # what a first visitor asks is never left out
    assert any(item["prompt"] == world.SEASONS for item in asked["test"]) and "seasons" not in texts
    total = len(entities) + 124
    assert 0.2 < len({i["name"] for i in asked["test"]}) / total < 0.4
    assert 0.12 < len({i["name"] for i in asked["dev"]}) / total < 0.28


def test_unseen_wordings_are_unseen(made):
    prompts = {m["content"] for d in made["sft"] for m in d["messages"] if m["role"] == "user"}
    unseen = [template for uses in world.load_wordings().values() for template in uses["unseen"]]
    patterns = [re.compile(re.sub(r"\\{\w+\\}", ".+", re.escape(t)), re.IGNORECASE) for t in unseen]
    assert not [(p, q.pattern) for p in prompts for q in patterns if q.fullmatch(p)]


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_names_that_contain_one_another_share_a_side(seed):
    entities, free = world.load_facts()
    sides = world.split_entities(entities, free, seed)
    for a, b in [("Mercury", "mercury"), ("Turkey", "turkey"), ("Guinea", "Papua New Guinea"), ("Guinea", "Equatorial Guinea"), ("Sudan", "South Sudan")]:
        assert sides[a] == sides[b]
    assert sides[world.SEASONS] == "test"


def test_the_corpus_is_full_of_quizzes(made):
    corpus = "\n\n".join(made["corpus"])
    questions = {item["prompt"] for side in ("train", "dev", "test") for item in made[side]}
    assert corpus.count("\nA) ") > 1000
    for document in made["corpus"]:  # a document that begins with a question goes on with options
        first, _, rest = document.partition("\n")
        if first in questions:
            assert rest.startswith("A) "), document
    assert all("\n\n" not in document for document in made["corpus"])


@pytest.mark.parametrize("damaged", [b"", b"\x01\x00\x02", b"\xff" * 400])
def test_a_damaged_file_of_tokens_is_refused(damaged, tokenizer, tmp_path):
    (tmp_path / "train.bin").write_bytes(damaged)
    with pytest.raises(InputError, match="train.bin: is damaged"):
        open_tokens(tmp_path / "train.bin", tokenizer)
