"""Fine-tuning: what becomes of a conversation, and what the loss looks at."""

import json

import numpy as np
import pytest
import torch

from data import Tokenizer
from data.text import read_json
from model import GPT, GPTConfig, cross_entropy
from sft import as_messages, batches_of_similar_length, prepare_special_tokens, sft_data_collator

TEXT = "What is the capital of Kenya? The capital of Kenya is Nairobi. And of Peru? It is Lima. Thank you. " * 10


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.train([TEXT], 300)


class Words:
    """The word tokenizer of the text that this project follows, made to work: its own lacked "the"."""

    def __init__(self, vocab, user, assistant, end, pad=0):
        self.vocab, self.user, self.assistant, self.end, self.pad = vocab, user, assistant, end, pad

    def encode(self, text):
        return [self.vocab[word] for word in text.split()]


def test_first_mask_table_of_the_text():
    words = Words({"Explain": 7, "gravity": 8, "Gravity": 11, "is": 12, "a": 13, "force": 14}, user=6, assistant=10, end=9)
    batch = sft_data_collator([{"prompt": "Explain gravity", "response": "Gravity is a force"}], words)
    assert batch["input_ids"].tolist() == [[6, 7, 8, 9, 10, 11, 12, 13, 14, 9]]
    assert batch["labels"].tolist() == [[-100, -100, -100, -100, -100, 11, 12, 13, 14, 9]]


def test_second_mask_table_of_the_text():
    vocab = {"The": 1, "the": 1, "quick": 2, "brown": 3, "fox": 4, "jumps": 5, "over": 6, "lazy": 7, "dog": 8}
    vocab.update({"What": 12, "is": 13, "a": 14, "?": 15})
    words = Words(vocab, user=9, assistant=10, end=11)
    pairs = [("The quick brown fox", "jumps over the lazy dog"), ("What is a dog ?", "a lazy brown fox")]
    batch = sft_data_collator([{"prompt": p, "response": r} for p, r in pairs], words)
    assert batch["input_ids"].tolist() == [[9, 1, 2, 3, 4, 11, 10, 5, 6, 1, 7, 8, 11], [9, 12, 13, 14, 8, 15, 11, 10, 14, 7, 3, 4, 11]]
    assert batch["labels"].tolist() == [[-100] * 7 + [5, 6, 1, 7, 8, 11], [-100] * 8 + [14, 7, 3, 4, 11]]


def test_collator_token_by_token(tokenizer):
    t = tokenizer
    batch = sft_data_collator(
        [
            {"prompt": "capital of Peru?", "response": "Lima."},
            {"messages": [{"role": "user", "content": c} if i % 2 == 0 else {"role": "assistant", "content": c} for i, c in enumerate(["a", "b", "c", "d"])]},
        ],
        t,
    )
    e = t.encode
    first = [t.user, *e("capital of Peru?"), t.end, t.assistant, *e("Lima."), t.end]
    second = [t.user, *e("a"), t.end, t.assistant, *e("b"), t.end, t.user, *e("c"), t.end, t.assistant, *e("d"), t.end]
    T = max(len(first), len(second))
    assert batch["input_ids"].dtype == batch["labels"].dtype == torch.int64
    assert batch["input_ids"].tolist() == [row + [t.pad] * (T - len(row)) for row in (first, second)]
    supervised = [len(e("Lima.")) + 1, len(e("b")) + 1 + len(e("d")) + 1]
    assert (batch["labels"] != -100).sum(dim=1).tolist() == supervised
    kept = batch["labels"] != -100
    assert (batch["labels"][kept] == batch["input_ids"][kept]).all()
    assert batch["labels"][0][kept[0]].tolist() == [*e("Lima."), t.end]


def test_only_the_assistants_words_are_looked_at(tokenizer):
    """The gradient of every logit that predicts a masked label is zero, and no other id behind a mask changes anything."""
    torch.manual_seed(0)
    model = GPT(GPTConfig(block_size=64, vocab_size=tokenizer.n_vocab, n_layer=1, n_head=2, n_embd=32))
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.1)
    batch = sft_data_collator([{"prompt": "capital of Peru?", "response": "Lima."}], tokenizer)
    n, T = len(tokenizer.encode("Lima.")) + 1, batch["input_ids"].size(1)
    logits, loss = model(batch["input_ids"], batch["labels"])
    everything = model(batch["input_ids"], batch["input_ids"])[0].detach().requires_grad_()  # (T - 1, V)
    torch.testing.assert_close(logits, everything[-n:])  # those of the response and of its end
    masked = cross_entropy(everything, batch["labels"][0, 1:])
    torch.testing.assert_close(masked, loss)
    masked.backward()
    assert (everything.grad[: T - 1 - n] == 0).all() and (everything.grad[T - 1 - n :] != 0).any(dim=1).all()


def test_three_formats():
    pair = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    assert as_messages({"prompt": "a", "response": "b"}) == pair
    assert as_messages({"messages": pair}) == pair
    assert as_messages({"instruction": "a", "input": "", "output": "b"}) == pair
    assert as_messages({"instruction": "a", "output": "b"}) == pair
    assert as_messages({"instruction": "a", "input": "c", "output": "b"})[0]["content"] == "a\n\nc"
    for wrong in ([], "a", {"prompt": "a"}, {"prompt": 3, "response": "b"}, {"promt": "a", "response": "b"}):
        with pytest.raises(ValueError):
            as_messages(wrong)


def test_json_lines_and_arrays_are_read_alike(tmp_path):
    examples = [{"prompt": "질문", "response": "답 🦜"}, {"prompt": "a\u2028b", "response": "c"}]
    lines, array = tmp_path / "my data.jsonl", tmp_path / "한국어.json"
    lines.write_bytes("\r\n\r\n".join(json.dumps(e, ensure_ascii=False) for e in examples).encode())
    array.write_text("\ufeff" + json.dumps(examples, indent=2), encoding="utf-8")
    assert [e for _, e in read_json(lines)] == [e for _, e in read_json(array)] == examples
    assert read_json(lines)[1][0] == f"{lines} line 3"


def test_every_conversation_comes_once_an_epoch_among_similar_ones():
    lengths = np.random.default_rng(0).integers(2, 100, size=501)
    chosen = batches_of_similar_length(lengths, 16, seed=1)
    epoch = [chosen(step) for step in range(32)]
    assert sorted(i for batch in epoch for i in batch) == list(range(501))
    padded = sum(len(batch) * lengths[batch].max() for batch in epoch)
    assert lengths.sum() / padded > 0.9  # under 10% padding
    second = [i for step in range(32, 64) for i in chosen(step)]
    assert sorted(second) == list(range(501)) and second != [i for batch in epoch for i in batch]
    again = batches_of_similar_length(lengths, 16, seed=1)
    assert (again(40) == chosen(40)).all()  # a function of the step alone


def test_of_the_embedding_only_the_special_tokens_learn(tokenizer):
    torch.manual_seed(0)
    model = GPT(GPTConfig(block_size=64, vocab_size=tokenizer.n_vocab, n_layer=1, n_head=2, n_embd=32))
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.1)
    before = model.embed.weight.detach().clone()
    prepare_special_tokens(model, tokenizer)
    batch = sft_data_collator([{"prompt": "capital of Peru?", "response": "Lima."}], tokenizer)
    model(batch["input_ids"], batch["labels"])[1].backward()
    first = tokenizer.endoftext
    assert torch.equal(model.embed.weight[:first], before[:first])
    assert torch.equal(model.embed.weight[tokenizer.end], before[tokenizer.encode("\n")[0]])
    assert (model.embed.weight.grad[:first] == 0).all() and (model.embed.weight.grad[first:] != 0).any()
