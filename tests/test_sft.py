"""Fine-tuning: what a conversation becomes, and what the loss looks at."""

import collections
import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
import torch

import compare
import data
import sft
from common.checkpoint import Checkpoint, load, save
from common.completion import fit
from common.files import read_json
from common.run import Run
from data import Tokenizer
from data.order import similar_lengths
from model import GPT, GPTConfig, cross_entropy
from pretrain import train
from sft import SFTConfig, as_messages, prepare_special_tokens, sft_data_collator

TEXT = "What is the capital of Kenya? The capital of Kenya is Nairobi. And of Peru? It is Lima. "
LIMA = {"prompt": "capital of Peru?", "response": "Lima."}


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.train([TEXT * 10], 300)


@pytest.fixture
def model(tokenizer):
    torch.manual_seed(0)
    sizes = dict(block_size=64, vocab_size=tokenizer.n_vocab, n_layer=1, n_head=2, n_embd=32)
    model = GPT(GPTConfig(**sizes))
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.1)
    return model


# The batch


class Words:
    """The word tokenizer of the Korean text we follow. We add "the", which the text left out."""

    def __init__(self, vocab, user, assistant, end, pad=0):
        self.vocab, self.user, self.assistant, self.end, self.pad = vocab, user, assistant, end, pad

    def encode(self, text):
        return [self.vocab[word] for word in text.split()]


def test_first_mask_table_of_the_text():
    vocab = {"Explain": 7, "gravity": 8, "Gravity": 11, "is": 12, "a": 13, "force": 14}
    words = Words(vocab, user=6, assistant=10, end=9)
    talk = {"prompt": "Explain gravity", "response": "Gravity is a force"}
    batch = sft_data_collator([talk], words)
    assert batch["input_ids"].tolist() == [[6, 7, 8, 9, 10, 11, 12, 13, 14, 9]]
    assert batch["labels"].tolist() == [[-100, -100, -100, -100, -100, 11, 12, 13, 14, 9]]


def test_second_mask_table_of_the_text():
    vocab = {"The": 1, "the": 1, "quick": 2, "brown": 3, "fox": 4, "jumps": 5, "over": 6}
    vocab |= {"lazy": 7, "dog": 8, "What": 12, "is": 13, "a": 14, "?": 15}
    words = Words(vocab, user=9, assistant=10, end=11)
    talks = [
        {"prompt": "The quick brown fox", "response": "jumps over the lazy dog"},
        {"prompt": "What is a dog ?", "response": "a lazy brown fox"},
    ]
    batch = sft_data_collator(talks, words)
    assert batch["input_ids"].tolist() == [
        [9, 1, 2, 3, 4, 11, 10, 5, 6, 1, 7, 8, 11],
        [9, 12, 13, 14, 8, 15, 11, 10, 14, 7, 3, 4, 11],
    ]
    assert batch["labels"].tolist() == [
        [-100] * 7 + [5, 6, 1, 7, 8, 11],
        [-100] * 8 + [14, 7, 3, 4, 11],
    ]


def test_collator_token_by_token(tokenizer):
    t, e = tokenizer, tokenizer.encode
    roles = ["user", "assistant", "user", "assistant"]
    messages = [{"role": r, "content": c} for r, c in zip(roles, "abcd", strict=True)]
    batch = sft_data_collator([LIMA, {"messages": messages}], t)
    first = [t.user, *e("capital of Peru?"), t.end, t.assistant, *e("Lima."), t.end]
    second = [t.user, *e("a"), t.end, t.assistant, *e("b"), t.end]
    second += [t.user, *e("c"), t.end, t.assistant, *e("d"), t.end]
    T = max(len(first), len(second))
    assert batch["input_ids"].dtype == batch["labels"].dtype == torch.int64
    assert batch["input_ids"].tolist() == [
        row + [t.pad] * (T - len(row)) for row in (first, second)
    ]
    kept = batch["labels"] != -100
    assert kept.sum(dim=1).tolist() == [len(e("Lima.")) + 1, len(e("b")) + 1 + len(e("d")) + 1]
    assert (batch["labels"][kept] == batch["input_ids"][kept]).all()
    assert batch["labels"][0][kept[0]].tolist() == [*e("Lima."), t.end]


def test_the_loss_looks_at_the_assistants_words_only(tokenizer, model):
    """Every logit that predicts a masked label has a gradient of zero. All others don't."""
    batch = sft_data_collator([LIMA], tokenizer)
    n, T = len(tokenizer.encode("Lima.")) + 1, batch["input_ids"].size(1)
    logits, loss = model(**batch)
    everything = model(batch["input_ids"], batch["input_ids"])[0].detach()  # (T - 1, V)
    torch.testing.assert_close(logits, everything[-n:])  # for the response and its end
    everything.requires_grad_()
    masked = cross_entropy(everything, batch["labels"][0, 1:])
    torch.testing.assert_close(masked, loss)
    masked.backward()
    assert (everything.grad[: T - 1 - n] == 0).all()
    assert (everything.grad[T - 1 - n :] != 0).any(dim=1).all()


def test_of_the_tables_only_the_special_tokens_learn(tokenizer, model, tmp_path):
    tables = model.embed, model.values
    before = [table.weight.detach().clone() for table in tables]
    pairs_before = model.pair_values.weight.detach().clone()
    prepare_special_tokens(model, tokenizer)
    first, [line_break] = tokenizer.endoftext, tokenizer.encode("\n")
    chat = [tokenizer.user, tokenizer.assistant, tokenizer.end]
    for table, rows in zip(tables, before, strict=True):
        assert (table.weight[chat] == rows[line_break]).all()
    started = [table.weight.detach().clone() for table in tables]
    batch = sft_data_collator([LIMA], tokenizer)
    model(**batch)[1].backward()
    for table in tables:
        assert (table.weight.grad[:first] == 0).all()
        assert (table.weight.grad[first:] != 0).any()
    model.zero_grad()
    config = SFTConfig(out=str(tmp_path), max_steps=5)
    train(model, lambda step: batch, config, Run(config, "sft", "sft.pt", {}))
    for table, rows in zip(tables, started, strict=True):
        assert torch.equal(table.weight[:first], rows[:first])
        assert not torch.equal(table.weight[first:], rows[first:])
    assert torch.equal(model.pair_values.weight, pairs_before)


def test_in_pairs_the_chat_template_counts_as_line_breaks(tokenizer, model, tmp_path):
    """Also after a checkpoint was written and read."""
    chat = [tokenizer.user, tokenizer.assistant, tokenizer.end]
    [line_break] = tokenizer.encode("\n")
    prepare_special_tokens(model, tokenizer)
    about = {"stage": "sft", "trained_on": {"files": []}}
    save(Checkpoint(tmp_path / "sft.pt", model, tokenizer, about))
    again, _ = load(tmp_path / "sft.pt")
    ordinary = [i for i in range(tokenizer.n_vocab) if i not in chat]
    for one in (model, again):
        assert one.alias[ordinary].tolist() == ordinary
        assert one.alias[chat].tolist() == [line_break] * 3
    ids = torch.tensor([[5, tokenizer.end, tokenizer.assistant, 6, 7]])
    as_text = torch.tensor([[5, line_break, line_break, 6, 7]])
    expected = again(as_text, as_text)[0]  # their other rows are still those of a line break
    torch.testing.assert_close(again(ids, ids)[0], expected)
    again.alias.copy_(torch.arange(tokenizer.n_vocab))
    assert not torch.allclose(again(ids, ids)[0], expected)


# The formats of conversations, and the order we read them in


def test_three_formats():
    pair = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    assert as_messages({"prompt": "a", "response": "b"}) == pair
    assert as_messages({"messages": pair}) == pair
    assert as_messages({"instruction": "a", "input": "", "output": "b"}) == pair
    assert as_messages({"instruction": "a", "output": "b"}) == pair
    with_input = as_messages({"instruction": "a", "input": "c", "output": "b"})
    assert with_input[0]["content"] == "a\n\nc"
    misspelled = {"promt": "a", "response": "b"}
    for wrong in ([], "a", {"prompt": "a"}, {"prompt": 3, "response": "b"}, misspelled):
        with pytest.raises(ValueError):
            as_messages(wrong)


def test_a_conversation_of_many_turns(tokenizer, monkeypatch):
    """We drop what can't fit at once, not turn by turn: encoding it takes linear time."""
    turns = [{"role": r, "content": c} for r, c in (("user", "of Peru?"), ("assistant", "Lima."))]
    encoded = []

    def encode_chat(messages, tokenizer):
        encoded.append(len(messages))
        return data.encode_chat(messages, tokenizer)

    monkeypatch.setattr(sft, "encode_chat", encode_chat)
    for system in ([], [{"role": "system", "content": "in short"}]):
        for n in (1, 2, 5, 1000):
            del encoded[:]
            row = sft.encode({"messages": system + turns * n}, tokenizer, 64)
            assert sum(encoded) < 2 * n + 64 * 64 / 3
            rest = n  # what is left if we drop one turn after another
            while len(data.encode_chat(system + turns * rest, tokenizer)[0]) > 64:
                rest -= 1
            assert row["input_ids"] == data.encode_chat(system + turns * rest, tokenizer)[0]
            history = system + turns * n + turns[:1]
            kept, ids = fit(history, tokenizer, 64)
            assert len(ids) <= 64 and kept[: len(system)] == system
            assert kept[len(system) :] == history[len(system) - len(kept) :]


def test_json_lines_and_arrays_are_read_alike(tmp_path):
    examples = [{"prompt": "질문", "response": "답 🦜"}, {"prompt": "a\u2028b", "response": "c"}]
    lines, array = tmp_path / "my data.jsonl", tmp_path / "한국어.json"
    rows = [json.dumps(example, ensure_ascii=False) for example in examples]
    lines.write_bytes("\r\n\r\n".join(rows).encode())
    array.write_text("\ufeff" + json.dumps(examples, indent=2), encoding="utf-8")
    for path in (lines, array):
        assert [example for _, example in read_json(path)] == examples
    assert read_json(lines)[1][0] == f"{lines} line 3"


def test_every_conversation_comes_once_an_epoch_among_similar_ones():
    lengths = np.random.default_rng(0).integers(2, 100, size=501)
    indices = similar_lengths(lengths, 16, seed=1)
    epoch = [indices(step) for step in range(32)]
    order = [i for batch in epoch for i in batch]
    assert sorted(order) == list(range(501))
    padded = sum(len(batch) * lengths[batch].max() for batch in epoch)
    assert lengths.sum() / padded > 0.9  # under 10% padding
    next_order = [i for step in range(32, 64) for i in indices(step)]
    assert sorted(next_order) == list(range(501)) and next_order != order
    again = similar_lengths(lengths, 16, seed=1)
    assert (again(40) == indices(40)).all()  # depends on nothing but the step


# Work is done once


@pytest.fixture
def small_run(tokenizer, model, tmp_path):
    """A function that fine-tunes a small base model on 20 conversations, into tmp_path."""
    about = {"stage": "base", "trained_on": {"files": []}}
    save(Checkpoint(tmp_path / "base.pt", model, tokenizer, about))
    talks = [{"prompt": f"Number {i}?", "response": f"It is {i}."} for i in range(20)]
    (tmp_path / "talks.json").write_text(json.dumps(talks), encoding="utf-8")

    def run(*options):
        data = ["--data", str(tmp_path / "talks.json"), "--batch_size", "4", "--device", "cpu"]
        sft.main(["--out", str(tmp_path), *data, *options])

    return run


@pytest.mark.parametrize("max_steps", ["1", "20"])
def test_every_conversation_is_encoded_once(max_steps, small_run, monkeypatch):
    encoded, encode_chat = [], sft.encode_chat

    def counting(messages, tokenizer):
        encoded.append(messages[0]["content"])
        return encode_chat(messages, tokenizer)

    monkeypatch.setattr(sft, "encode_chat", counting)
    small_run("--max_steps", max_steps)
    assert sorted(encoded) == sorted(f"Number {i}?" for i in range(20))


def test_every_checkpoint_is_read_once(small_run, tmp_path, monkeypatch):
    loaded, load = collections.Counter(), torch.load

    def counting(file, *args, **kwargs):
        content = Path(file).read_bytes() if isinstance(file, str | Path) else file.getvalue()
        loaded[hashlib.sha256(content).hexdigest()] += 1
        return load(file, *args, **kwargs)

    def counts():
        """How often each checkpoint was loaded since the last call."""
        names = ("base.pt", "random.pt", "sft.pt")
        sha256 = {
            name: hashlib.sha256((tmp_path / name).read_bytes()).hexdigest()
            for name in names
            if (tmp_path / name).exists()
        }
        found = {name: loaded[key] for name, key in sha256.items()}
        assert sum(found.values()) == loaded.total()
        loaded.clear()
        return found

    monkeypatch.setattr(torch, "load", counting)
    small_run("--max_steps", "1", "--random_weights")
    assert counts() == {"base.pt": 1, "random.pt": 0}
    small_run("--max_steps", "1")
    assert counts() == {"base.pt": 1, "random.pt": 1, "sft.pt": 0}  # the control is compared, too
    compare.main(["--out", str(tmp_path), "--device", "cpu"])
    assert counts() == {"base.pt": 1, "random.pt": 1, "sft.pt": 1}
