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
from common.checkpoint import FORMAT, Checkpoint, load, read_checkpoint, save
from common.completion import complete, respond
from common.evaluation import text_loss
from common.messages import InputError
from common.pair import load_pair, with_control
from common.report import score_table, show_examples, show_scores, side_by_side
from data import Tokenizer
from data.world import Scorer
from model import GPT, GPTConfig


@pytest.fixture(scope="module")
def scorer():
    return Scorer()


CAPITAL = {"table": "countries", "attribute": "capital"}
KENYA = {**CAPITAL, "name": "Kenya", "accept": ["Nairobi"]}
MEXICO = {**CAPITAL, "name": "Mexico", "accept": ["Mexico City"]}
SENEGAL = {
    "table": "countries",
    "attribute": "currency",
    "name": "Senegal",
    "accept": ["West African CFA franc", "CFA franc"],
}
SOUTH_AFRICA = {
    "table": "countries",
    "attribute": "continent",
    "name": "South Africa",
    "accept": ["Africa"],
}
IODINE = {"table": "elements", "attribute": "symbol", "name": "iodine", "accept": ["I"]}
IRON = {"table": "elements", "attribute": "number", "name": "iron", "accept": ["26"]}
SEASONS = {
    "attribute": "free question",
    "name": "What is the primary cause of Earth's seasons?",
    "keys": [["tilt", "tilted"], ["axis"]],
}


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


def test_other_programs_find_load_and_respond_in_compare():
    assert compare.load is load and compare.respond is respond
    assert compare.share([True, False]) == 0.5 and compare.share([]) is None


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
    load_pair(tmp_path)
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
    assert list(with_control(*load_pair(tmp_path))) == ["base", "tuned"]
    shutil.copy(tmp_path / "sft.pt", tmp_path / "random.pt")
    assert list(with_control(*load_pair(tmp_path))) == ["base", "tuned", "random"]
    about = {"stage": "sft", "trained_on": {}, "base_sha256": "of another"}
    write(tmp_path / "random.pt", base.model, base.tokenizer, **about)
    assert list(with_control(*load_pair(tmp_path))) == ["base", "tuned"]


@pytest.mark.parametrize("blocks", [(8, 8), (64, 8), (8, 64)])
def test_a_small_block_is_enough(blocks, tmp_path, capsys):
    """Prompts, conversations and texts are longer than the block of one model, or of both."""
    models = [make_model(block_size=block_size) for block_size in blocks]
    text = "Why is the sky blue on a clear day? " * 20
    ids = [models[0][1].endoftext, *models[0][1].encode(text)]
    (tmp_path / "val.bin").write_bytes(np.array(ids, "<u2").tobytes())
    size = (tmp_path / "val.bin").stat().st_size
    (tmp_path / "val.sha256").write_text(f"of this text {size}", encoding="utf-8")
    write_pair(tmp_path, models, {"text_sha256": "of this text"}, examples=["a", text])
    run(tmp_path)
    results = json.loads((tmp_path / "comparison.json").read_text(encoding="utf-8"))
    assert len(results["conversation"]["tokens"]) == 8
    assert results["tuned"]["val_bpb"] > 0
    run(tmp_path, "--ask", text)
    assert "BASE" in capsys.readouterr().out


@pytest.mark.parametrize(
    "stamp", [b"of another text {}", b"of this text 1", b"\xff\xfe", b"", b"of this text"]
)
def test_a_validation_text_of_another_run_is_not_scored(stamp, tmp_path):
    model, tokenizer = make_model()
    val_path = tmp_path / "val.bin"
    val_path.write_bytes(np.array(tokenizer.encode("the cat " * 50), "<u2").tobytes())
    size = str(val_path.stat().st_size).encode()
    val_path.with_suffix(".sha256").write_bytes(stamp.replace(b"{}", size))
    write_pair(tmp_path, base_about={"text_sha256": "of this text"})
    assert "base" not in compare.compare(*load_pair(tmp_path))
    val_path.with_suffix(".sha256").write_bytes(b"of this text " + size)
    assert "val_bpb" in compare.compare(*load_pair(tmp_path))["base"]


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
        lines = side_by_side(left, "The answer is " + "short " * 20, width)
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
    "tuned": {"answered": 1.0, "unseen": 1.0, "train": 1.0, "smalltalk": None, "stops": 1.0},
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
    words = " ".join(out.split())  # we say how the control differs, and no more
    assert "random weights" in words and "read nothing" not in words
    heading, rows = score_table(scores)
    assert "560 held-out test questions" in heading and len({len(row) for row in rows}) == 1


def test_nothing_is_computed_for_nobody(small_world):
    results = json.loads((small_world / "comparison.json").read_text(encoding="utf-8"))
    shown = {"answered", "stops", "unseen", "train", "smalltalk", "val_loss", "val_bpb"}
    assert set(results["tuned"]) == shown


def test_the_examples_suit_what_the_models_have_read(tmp_path):
    write_pair(tmp_path)
    prompts = [e["prompt"] for e in compare.compare(*load_pair(tmp_path))["examples"]]
    assert prompts == compare.GREETINGS
    write_pair(tmp_path, base_about={"trained_on": {"world": 1}}, examples=[])
    prompts = [e["prompt"] for e in compare.compare(*load_pair(tmp_path))["examples"]]
    assert prompts == compare.EXAMPLES
    write_pair(tmp_path, examples=["My own?"])
    prompts = [e["prompt"] for e in compare.compare(*load_pair(tmp_path))["examples"]]
    assert prompts == ["My own?"]
