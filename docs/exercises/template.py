"""
Exercise 3: the chat template, and the mask that comes with it.

    messages   [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ok"}, ...]
    tokenizer  encode(text) returns a list of ids; .user, .assistant and .end are special ids

They take turns, the user first. Each message becomes the token of its role, its text and <|end|>,
with nothing in between. Encode each text by itself. If the user spoke last, add <|assistant|>, the
cue to answer. Return (input_ids, supervised), two lists of equal length. supervised is True on what
the model has to say itself: the text of each answer, and the <|end|> that closes it.

An example, with a token for each letter: the user says "hi", the assistant says "ok".

                <|user|>   h     i   <|end|> <|assistant|>  o     k   <|end|>
    input_ids     257     104   105    259        258      111   107    259
    supervised   False   False False  False      False    True  True   True

In the project: encode_chat() in data/chat.py. It takes a system message, too.
"""

from data import Tokenizer

TOKENIZER = Tokenizer.train(["any text"], 261)  # 256 bytes and five special tokens


def encode_chat(messages, tokenizer):
    raise NotImplementedError("your turn")


def encode(*texts):
    turns = [(("user", "assistant")[i % 2], text) for i, text in enumerate(texts)]
    return encode_chat([{"role": role, "content": text} for role, text in turns], TOKENIZER)


def test_the_ids():
    ids, _ = encode("hi", "ok")
    assert ids == [257, 104, 105, 259, 258, 111, 107, 259], f"not those of the example: {ids}"


def test_the_mask():
    _, mask = encode("hi", "ok")
    assert mask[5:] == [True] * 3, f"o, k and <|end|> are the model's to say, not {mask[5:]}"
    assert mask[:5] == [False] * 5, f"the model doesn't say the first five tokens: {mask[:5]}"


def test_every_answer_is_supervised():
    _, mask = encode("hi", "ok", "hi", "ok")
    assert mask == encode("hi", "ok")[1] * 2, f"two equal turns have different masks: {mask}"


def test_the_cue_to_answer():
    assert encode("hi") == ([257, 104, 105, 259, 258], [False] * 5), "the user spoke last: add 258"


def test_a_typed_end_is_only_text():
    ids, _ = encode("<|end|>", "ok")
    assert ids.count(259) == 2, f"the user typed <|end|>, and that ended the turn: {ids}"
