"""
Fourteen bugs that implementations of DPO have shipped, and the test that catches each.

They are quiet bugs, too: the loss falls below ln 2, and the model learns something else. Each test
says what the bug is and where it was seen. To learn what a bug does, put it into dpo.py and see
which test turns red.
"""

import json
import math

import pytest
import torch

import dpo
from common.checkpoint import Checkpoint, read_checkpoint, save
from common.messages import InputError
from data import Tokenizer
from dpo import Chooser, DPOConfig, dpo_data_collator, encode_pair, log_probs_of, read_pairs
from model import GPT, GPTConfig

TEXT = "What is the capital of Kenya? The capital of Kenya is Nairobi. And of Peru? It is Lima. "
PAIR = {"prompt": "Kenya?", "chosen": "The capital is Nairobi.", "rejected": "Lima."}
LONGER = {"prompt": "What is the capital of Peru?", "chosen": "Lima.", "rejected": "It is Lima."}
BETA = 0.1


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.train([TEXT * 10], 300)


def make_model(tokenizer, make=GPT, dropout=0.0):
    """A small network in which everything depends on everything."""
    torch.manual_seed(0)
    sizes = dict(block_size=64, vocab_size=tokenizer.n_vocab, n_layer=2, n_head=2, n_embd=32)
    model = make(GPTConfig(**sizes, dropout=dropout))
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.1)
    model.beta, model.likelihood = BETA, 0.0
    return model


@pytest.fixture
def model(tokenizer):
    return make_model(tokenizer, Chooser)


def by_hand(model, prompt, answer, tokenizer):
    """The log-probability of an answer and its <|end|>, position by position."""
    row = [tokenizer.user, *tokenizer.encode(prompt), tokenizer.end, tokenizer.assistant]
    total = 0.0
    for token in [*tokenizer.encode(answer), tokenizer.end]:
        logits, _ = GPT.forward(model, torch.tensor([row]))  # (1, 1, V)
        total += logits[0, 0].log_softmax(dim=-1)[token].item()
        row.append(token)
    return total


def batch_of(examples, tokenizer):
    return dpo_data_collator([encode_pair(e, tokenizer, 64) for e in examples], tokenizer)


def test_01_log_probabilities_are_summed(tokenizer, model):
    """Log-probabilities are averaged over the tokens, so beta means something else.

    Seen in minimind (issues 298 and 659) and LLMs-from-scratch.
    """
    [[chosen, rejected]] = model.log_probs(**batch_of([PAIR], tokenizer)).tolist()
    assert chosen == pytest.approx(by_hand(model, "Kenya?", PAIR["chosen"], tokenizer), rel=1e-5)
    assert rejected == pytest.approx(by_hand(model, "Kenya?", "Lima.", tokenizer), rel=1e-5)

    reference = torch.tensor([[chosen - 2.0, rejected + 1.0]])  # chosen gained 2 nats, rejected -1
    margins, loss = model(**batch_of([PAIR], tokenizer), reference=reference)
    assert margins.tolist() == pytest.approx([BETA * 3.0], rel=1e-4)
    assert loss.item() == pytest.approx(math.log(1 + math.exp(-BETA * 3.0)), rel=1e-5)


def test_02_padding_is_not_in_the_sum(tokenizer, model):
    """Padding counts in the sum, so a pair's loss depends on its neighbors in the batch.

    Seen in nipunbatra/llm-from-scratch, mlx-lm-lora (pull request 88) and 0xallam (issue 4).
    """
    together = model.log_probs(**batch_of([PAIR, LONGER], tokenizer))
    apart = [model.log_probs(**batch_of([example], tokenizer)) for example in (PAIR, LONGER)]
    torch.testing.assert_close(together, torch.cat(apart), rtol=1e-5, atol=1e-5)


def test_03_the_prompt_is_not_in_the_sum(tokenizer, model):
    """The tokens of the prompt count in the sum. Both answers share them, so it seems harmless.

    OpenRLHF's issue 235 explains when it isn't.
    """
    start = len(tokenizer.encode("Kenya?")) + 3  # with <|user|>, <|end|> and <|assistant|>
    for row in encode_pair(PAIR, tokenizer, 64):
        assert row["labels"][:start] == [-100] * start
        assert row["labels"][start:] == row["input_ids"][start:]

    turns = [("user", "Peru?"), ("assistant", "Lima."), ("user", "Kenya?")]
    talk = [{"role": role, "content": text} for role, text in turns]
    for row in encode_pair({**PAIR, "prompt": talk}, tokenizer, 64):  # the first answer is prompt
        ids = row["input_ids"]
        assert row["labels"].count(-100) == len(ids) - ids[::-1].index(tokenizer.assistant)


def test_04_the_first_token_of_an_answer_counts(tokenizer, model):
    """Off by one: the first token of the answer is lost.

    Seen in OpenRLHF (issue 973).
    """
    example = {"prompt": "Peru?", "chosen": "l", "rejected": "k"}  # answers of one token
    found = model.log_probs(**batch_of([example], tokenizer))[0].tolist()
    expected = [by_hand(model, "Peru?", letter, tokenizer) for letter in "lk"]
    assert found == pytest.approx(expected, rel=1e-5)


def test_05_the_sum_does_not_wrap_around(tokenizer, model):
    """Labels are shifted with torch.roll: the last position of a row meets its first label.

    Seen in nipunbatra/llm-from-scratch.
    """
    batch = batch_of([PAIR], tokenizer)
    before = model.log_probs(**batch)
    batch["labels"][:, :, 0] = tokenizer.user  # nothing predicts the first token of a row
    assert torch.equal(model.log_probs(**batch), before)


def test_06_chosen_and_rejected_share_their_prompt(tokenizer):
    """Prompt and answer are tokenized together in one branch and separately in the other.

    Seen in TRL (issue 2054, pull requests 1153 and 2209) and axolotl (issue 1616).
    """
    for prompt in ("Kenya?", "Kenya? ", "What is\n", "  the capital"):
        for chosen, rejected in (("It is Lima.", " Lima"), ("\nLima", "is"), ("'s", "??")):
            example = {"prompt": prompt, "chosen": chosen, "rejected": rejected}
            rows = encode_pair(example, tokenizer, 64)
            asked = [tokenizer.user, *tokenizer.encode(prompt), tokenizer.end, tokenizer.assistant]
            for row, answer in zip(rows, (chosen, rejected), strict=True):
                assert row["input_ids"] == [*asked, *tokenizer.encode(answer), tokenizer.end]

    talks = [[{"role": "user", "content": t}, {"role": "assistant", "content": "x"}] for t in "ab"]
    with pytest.raises(ValueError, match="differ before their last answers"):
        encode_pair({"chosen": talks[0], "rejected": talks[1]}, tokenizer, 64)


def saved_model(folder, tokenizer, dropout=0.0):
    """A tuned model on the disk, with a file of forty pairs beside it."""
    about = {"stage": "sft", "base": "base.pt", "trained_on": {"files": []}}
    model = make_model(tokenizer, dropout=dropout)
    save(Checkpoint(folder / "sft.pt", model, tokenizer, about))
    names = [f"{a}{b}" for a in "abcdefgh" for b in "klmno"]
    pairs = [{"prompt": f"{n}?", "chosen": f"It is {n}.", "rejected": f"{n}"} for n in names]
    lines = "".join(json.dumps(pair) + "\n" for pair in pairs)
    (folder / "pairs.jsonl").write_text(lines, encoding="utf-8")
    return model


def tune(folder, *options):
    """Run dpo.py on what saved_model() made. Returns the rows of its log."""
    common = ["--out", str(folder), "--data", str(folder / "pairs.jsonl"), "--device", "cpu"]
    dpo.main([*common, "--max_steps", "20", "--batch_size", "8", *options])
    return [json.loads(line) for line in (folder / "dpo.jsonl").read_text("utf-8").splitlines()]


@pytest.mark.parametrize("dropout", [0.0, 0.5])
@pytest.mark.parametrize("bfloat16", [False, True])
def test_07_the_first_loss_is_ln_2(dropout, bfloat16, tokenizer, tmp_path, monkeypatch):
    """The reference has dropout, or the model has it and the reference hasn't.

    Seen in TRL (issues 744, 639 and 2042). Rounding to bfloat16 would do the same in small.
    """
    saved_model(tmp_path, tokenizer, dropout)
    losses, forward = [], Chooser.forward

    def watched(model, *args, **batch):
        margins, loss = forward(model, *args, **batch)
        losses.append(loss.item())
        return margins, loss

    monkeypatch.setattr(Chooser, "forward", watched)
    dtype = torch.bfloat16 if bfloat16 else torch.float32
    monkeypatch.setattr("common.run.precision", lambda device: dtype)
    tune(tmp_path)
    assert losses[0] == pytest.approx(math.log(2), abs=1e-5)
    assert losses[-1] < math.log(2) - 1e-3


def test_08_the_model_learns_and_the_reference_stays(tokenizer, model, tmp_path):
    """The reference is trained along, or the model gets no gradient.

    Seen in minimind (issue 430) and POVID (issue 11).
    """
    batch = batch_of([PAIR, LONGER], tokenizer)
    reference = log_probs_of(
        model, [encode_pair(e, tokenizer, 64) for e in (PAIR, LONGER)], tokenizer
    )
    model(**batch, reference=reference)[1].backward()
    grads = [p.grad for p in model.blocks.parameters()]
    assert all(grad.abs().sum() > 0 for grad in grads)
    assert not reference.requires_grad

    before = saved_model(tmp_path, tokenizer).state_dict()
    content = (tmp_path / "sft.pt").read_bytes()
    assert tune(tmp_path)[-1]["loss"] < math.log(2) - 1e-3  # else the reference came along
    after = read_checkpoint(tmp_path / "dpo.pt").model.state_dict()
    assert (tmp_path / "sft.pt").read_bytes() == content
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {name for name in before if name.startswith("blocks.")}


def test_09_a_long_pair_is_dropped_and_never_cut(tokenizer, tmp_path, capsys):
    """An answer that doesn't fit is cut, and its closing token goes.

    Seen in LlamaFactory (issue 4402) and TRL (pull request 2209).
    """
    n = max(len(row["input_ids"]) for row in encode_pair(PAIR, tokenizer, 64))
    assert encode_pair(PAIR, tokenizer, n) is not None
    assert encode_pair(PAIR, tokenizer, n - 1) is None

    long = {**PAIR, "rejected": "Lima. " * 100}
    path = tmp_path / "pairs.jsonl"
    path.write_text("\n".join(map(json.dumps, (long, PAIR))), encoding="utf-8")
    assert read_pairs(path, tokenizer, 64) == [encode_pair(PAIR, tokenizer, 64)]
    assert "Of 2 pairs, we dropped 1: over 64 tokens" in capsys.readouterr().out
    path.write_text(json.dumps(long), encoding="utf-8")
    with pytest.raises(InputError, match="no pair fits 64 tokens"):
        read_pairs(path, tokenizer, 64)


def test_10_the_closing_token_counts_in_both_answers(tokenizer, model):
    """The closing token is missing from the pairs, so stopping is never preferred.

    Seen in TRL (issue 1239) and PaddleFormers (pull request 4909).
    """
    batch = batch_of([PAIR, LONGER], tokenizer)
    assert ((batch["labels"] == tokenizer.end).sum(dim=-1) == 1).all()  # of each of the answers
    before = model.log_probs(**batch)
    batch["labels"][batch["labels"] == tokenizer.end] = -100
    assert (model.log_probs(**batch) - before > 0.1).all()  # nats that the token costs


def test_11_a_pair_with_nothing_to_score_is_refused(tokenizer, tmp_path):
    """A pair whose answer has no tokens gives NaN.

    Seen in open-instruct (pull request 1625).
    """
    talk = [{"role": role, "content": "x"} for role in ("user", "assistant", "user")]
    for key, answer, complaint in (
        ("chosen", "", "must have text in it"),
        ("rejected", " \n", "must have text in it"),
        ("rejected", [], "there is no answer"),
        ("chosen", talk, "must end with an answer of the assistant"),
    ):
        path = tmp_path / "pairs.jsonl"
        lines = [PAIR, {**PAIR, key: answer}]
        path.write_text("\n".join(map(json.dumps, lines)), encoding="utf-8")
        with pytest.raises(InputError, match=f"pairs.jsonl line 2: .*{complaint}"):
            read_pairs(path, tokenizer, 64)


def test_12_the_chosen_answer_is_the_one_preferred(tokenizer, tmp_path):
    """Chosen and rejected are swapped: a classic."""
    saved_model(tmp_path, tokenizer)
    rows = tune(tmp_path, "--lr", "0.01")
    lines = (tmp_path / "pairs.jsonl").read_text(encoding="utf-8").splitlines()
    before, now = (read_checkpoint(tmp_path / name).model for name in ("sft.pt", "dpo.pt"))
    for pair in map(json.loads, lines[::8]):
        answers = [(pair["prompt"], pair[key], tokenizer) for key in ("chosen", "rejected")]
        chosen, rejected = (by_hand(now, *a) - by_hand(before, *a) for a in answers)  # gained
        assert chosen > rejected
    assert rows[-1]["margin"] > 0.1 and rows[-1]["told_apart"] == 1.0


def test_13_equal_answers_are_refused(tokenizer, tmp_path):
    """Chosen and rejected are the same, so the pair teaches nothing: another classic."""
    path = tmp_path / "pairs.json"
    path.write_text(json.dumps([PAIR, {**PAIR, "rejected": PAIR["chosen"]}]), encoding="utf-8")
    with pytest.raises(InputError, match="pairs.json entry 2: both answers are the same"):
        read_pairs(path, tokenizer, 64)


def test_14_the_likelihood_of_the_chosen_answer_is_logged(tokenizer, tmp_path):
    """Nobody looks at the log-probability of the chosen answer, and often it falls.

    See eric-mitchell/direct-preference-optimization (issues 8, 32 and 36), TRL (issue 800) and
    Razin et al. 2024 (arXiv 2410.08847). The log has it, for pairs that we don't train on.
    """
    saved_model(tmp_path, tokenizer)
    row = tune(tmp_path)[-1]
    pairs = read_pairs(tmp_path / "pairs.jsonl", tokenizer, 64)
    _, held_out = dpo.hold_out(pairs, DPOConfig.seed)
    assert len(held_out) == 4
    model = make_model(tokenizer, Chooser)
    before = log_probs_of(model, held_out, tokenizer)
    model.load_state_dict(read_checkpoint(tmp_path / "dpo.pt").model.state_dict())
    now = log_probs_of(model, held_out, tokenizer)
    assert row["chosen"] == pytest.approx(now[:, 0].mean().item(), rel=1e-4)
    assert row["rejected"] == pytest.approx(now[:, 1].mean().item(), rel=1e-4)
    gained = now - before
    margins = DPOConfig.beta * (gained[:, 0] - gained[:, 1])
    assert row["margin"] == pytest.approx(margins.mean().item(), rel=1e-3, abs=1e-5)
    assert row["told_apart"] == (margins > 0).float().mean().item()
    assert row["val_loss"] == pytest.approx((1 + (-margins).exp()).log().mean().item(), rel=1e-4)
