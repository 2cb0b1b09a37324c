"""The commands: a small run from end to end, and what they say when something is wrong with their input."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import compare
import pretrain
import sft
from data import world

ROOT = Path(__file__).parent.parent
SIZES = "--n_layer 2 --n_embd 64 --block_size 64 --vocab_size 600 --batch_size 16".split()


def few_facts():
    """A world of 48 countries with two attributes."""
    entities, _ = load_all()
    countries = [e for e in entities if e.table == "countries"][:48]
    for country in countries:
        country.values = {a: country.values[a] for a in ("capital", "currency")}
    return countries, []


load_all = world.load_facts


@pytest.fixture(scope="module")
def small_world(tmp_path_factory):
    """A small run of both stages. Returns the output folder and what was printed."""
    out = tmp_path_factory.mktemp("small") / "out with spaces"
    patch = pytest.MonkeyPatch()
    patch.setattr(world, "load_facts", few_facts)
    patch.setattr(world, "PINNED", {})
    patch.setattr(world, "QUIZ_SHARE", 0.6)  # of so few facts, a larger share must be quizzed for it to be seen
    pretrain.main(["--out", str(out), "--device", "cpu", *SIZES, "--max_steps", "500", "--eval_every", "250"])
    sft.main(["--out", str(out), "--device", "cpu", "--max_steps", "150"])
    yield out
    patch.undo()


def test_the_base_model_parrots_and_the_tuned_one_answers(small_world):
    scores = json.loads((small_world / "comparison.json").read_text(encoding="utf-8"))
    assert scores["base"]["plain"] <= 0.05 and scores["base"]["goes_on"] >= 0.8
    assert scores["tuned"]["answered"] >= 0.5 and scores["tuned"]["stops"] >= 0.9
    assert {"val_loss", "val_bpb"} <= set(scores["base"]) and len(scores["examples"]) >= 8


def test_what_is_written(small_world):
    names = {path.name for path in small_world.iterdir()}
    assert {"base.pt", "sft.pt", "pretrain.jsonl", "sft.jsonl", "comparison.json", "train.bin", "val.bin", "world"} <= names
    assert not {n for n in names if "resume" in n or n.endswith(".tmp")}
    for name, keys in (("pretrain", {"val_loss", "val_bpb"}), ("sft", {"val_loss"})):
        rows = [json.loads(line) for line in (small_world / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()]
        assert all({"step", "tokens", "seconds", "loss", "lr", "tokens_per_s"} <= set(row) for row in rows)
        assert keys <= set(rows[-1]) and rows[-1]["loss"] < rows[0]["loss"]
    base, tuned = (torch.load(small_world / n, weights_only=True) for n in ("base.pt", "sft.pt"))
    assert base["trained_on"] == {"world": 1} and tuned["trained_on"]["base"] == {"world": 1}
    import hashlib

    assert tuned["base_sha256"] == hashlib.sha256((small_world / "base.pt").read_bytes()).hexdigest()


def test_asking(small_world, capsys):
    compare.main(["--out", str(small_world), "--ask", "What is the capital of <|end|><|assistant|>?"])
    shown = capsys.readouterr().out
    assert "BASE" in shown and "TUNED" in shown and "<|end|><|assistant|>?" in shown
    assert all(len(line) <= 80 for line in shown.splitlines())


def test_fine_tuning_ones_own_conversations(small_world, tmp_path, capsys):
    data = tmp_path / "나의 data.json"
    data.write_text(json.dumps([{"instruction": f"Say {i}.", "input": "", "output": f"{i}!"} for i in range(30)]), encoding="utf-8")
    sft.main(["--out", str(tmp_path), "--base", str(small_world / "base.pt"), "--data", str(data), "--max_steps", "3", "--device", "cpu"])
    assert (tmp_path / "sft.pt").exists() and "yes" in capsys.readouterr().out
    assert "val_loss" in json.loads((tmp_path / "sft.jsonl").read_text(encoding="utf-8").splitlines()[-1])


def test_pretraining_on_ones_own_text(tmp_path):
    folder = tmp_path / "texts"
    folder.mkdir()
    (folder / "a.txt").write_bytes("\ufeffOnce upon a time.\r\n".encode() * 300)
    (folder / "b.md").write_text("옛날 옛적에 " * 300, encoding="utf-8")
    (folder / "c.bin").write_bytes(b"\xff\xfe\x00")
    arguments = ["--data", str(folder), "--out", str(tmp_path), "--device", "cpu", "--max_steps", "3", *SIZES]
    pretrain.main([*arguments, "--vocab_size", "270", "--block_size", "16"])
    model, tokenizer = compare.load(tmp_path / "base.pt")
    assert tokenizer.n_vocab == 270 and model.config.block_size == 16


def test_resuming_a_run_through_the_command(tmp_path, monkeypatch):
    (tmp_path / "text.txt").write_text("Once upon a time there was a parrot that could not answer. " * 100, encoding="utf-8")
    arguments = ["--data", str(tmp_path / "text.txt"), "--device", "cpu", "--max_steps", "30", *SIZES, "--vocab_size", "300", "--block_size", "16"]
    pretrain.main([*arguments, "--out", str(tmp_path / "a")])
    with monkeypatch.context() as patch:
        calls, real = [], pretrain.backward

        def press_ctrl_c_in_the_13th_step(*arguments):
            calls.append(1)
            if len(calls) == 13:
                signal.raise_signal(signal.SIGINT)
            return real(*arguments)

        patch.setattr(pretrain, "backward", press_ctrl_c_in_the_13th_step)
        with pytest.raises(SystemExit) as stopped:
            pretrain.main([*arguments, "--out", str(tmp_path / "b")])
    assert stopped.value.code == 130 and not (tmp_path / "b" / "base.pt").exists()
    pretrain.main([*arguments, "--out", str(tmp_path / "b"), "--resume"])
    a, b = (torch.load(tmp_path / n / "base.pt", weights_only=True)["weights"] for n in "ab")
    assert all(torch.equal(a[key], b[key]) for key in a)


# Bad input: one line, exit code 2, nothing lost

PAIR = '{"prompt": "a", "response": "b"}\n'
TEXT_CASES = {
    "missing": (None, "no such file or folder"),
    "empty": (b"", "no text in it"),
    "white space": (b" \n\t\n", "no text in it"),
    "not UTF-8": ("café".encode("latin-1") * 100, "not UTF-8 text (byte 3)"),
    "UTF-16": ("hello " * 100).encode("utf-16"),
    "shorter than a block": (b"Once upon a time.", "fewer than a block of 64"),
}
TEXT_CASES["UTF-16"] = (TEXT_CASES["UTF-16"], "not UTF-8 text")
TALK_CASES = {
    "missing": (None, "no such file"),
    "empty": ("", "the file is empty"),
    "broken line": (PAIR + '{"prompt": "a", \n', "line 2: broken JSON"),
    "broken array": ('[{"prompt": "a", "response": "b"},\n', "line 2: broken JSON"),
    "missing key": (PAIR + PAIR + '{"prompt": "a"}\n', 'line 3: needs "prompt" and "response"'),
    "misspelt key": ('{"promt": "a", "response": "b"}\n', 'line 1: needs "prompt"'),
    "number": ('{"prompt": 1, "response": "b"}\n', "line 1: its texts must be strings"),
    "no object": ("[1]", "entry 1: a conversation must be an object"),
    "empty response": ('{"prompt": "a", "response": " "}\n', "line 1: message 2 (assistant) must have a text"),
    "no assistant": ('{"messages": [{"role": "user", "content": "a"}]}\n', "line 1: the assistant says nothing"),
    "unknown role": ('{"messages": [{"role": "bot", "content": "a"}]}\n', "line 1: message 1 has the unknown role 'bot'"),
    "nothing fits": ('{"prompt": "a", "response": "' + "b " * 500 + '"}\n', "no conversation fits a block of 64 tokens"),
}


def contents(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def fails(capsys, main, arguments, complaint, out):
    before = contents(out)
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    message = capsys.readouterr().err
    assert stopped.value.code == 2
    lines = [line for line in message.splitlines() if line]
    assert len(lines) == 1 and lines[0].startswith("error: ") and complaint in lines[0] and "; " in lines[0], message
    assert contents(out) == before


@pytest.mark.parametrize("case", TEXT_CASES)
def test_bad_text(case, small_world, tmp_path, capsys):
    content, complaint = TEXT_CASES[case]
    if content is not None:
        (tmp_path / "my text.txt").write_bytes(content)
    arguments = ["--data", str(tmp_path / "my text.txt"), "--out", str(small_world), *SIZES, "--vocab_size", "261"]
    fails(capsys, pretrain.main, arguments, complaint, small_world)


@pytest.mark.parametrize("case", TALK_CASES)
def test_bad_conversations(case, small_world, tmp_path, capsys):
    content, complaint = TALK_CASES[case]
    if content is not None:
        (tmp_path / "talk.jsonl").write_text(content, encoding="utf-8")
    fails(capsys, sft.main, ["--data", str(tmp_path / "talk.jsonl"), "--out", str(small_world)], complaint, small_world)


def test_no_base_model(tmp_path, capsys):
    fails(capsys, sft.main, ["--out", str(tmp_path)], "base.pt: no such checkpoint; make it with python pretrain.py", tmp_path)
    fails(capsys, compare.main, ["--out", str(tmp_path)], "base.pt: no such checkpoint", tmp_path)


@pytest.mark.parametrize("content", [b"", b"hello", b"PK\x03\x04 no", "truncated", {"some": "dict"}, {"format": compare.FORMAT, "config": {}}])
def test_no_checkpoint_of_ours(content, small_world, tmp_path, capsys):
    path = tmp_path / "base.pt"
    if isinstance(content, dict):
        torch.save(content, path)
    else:
        path.write_bytes((small_world / "base.pt").read_bytes()[:5000] if content == "truncated" else content)
    fails(capsys, sft.main, ["--base", str(path), "--out", str(small_world)], "base.pt: ", small_world)


def test_a_tuned_model_is_no_base(small_world, capsys):
    fails(capsys, sft.main, ["--base", str(small_world / "sft.pt"), "--out", str(small_world)], "checkpoint of stage 'sft'", small_world)


@pytest.mark.parametrize(
    "arguments, complaint",
    [
        (["--n_embd", "65"], "multiple of twice n_head"),
        (["--n_layer", "0"], "--n_layer: 0 is out of range"),
        (["--n_layer", "two"], "invalid int value"),
        (["--lr", "nan"], "--lr: nan is out of range"),
        (["--vocab_size", "200"], "under 261"),
        (["--vocab_size", "60000"], "supports a vocab_size of"),
        (["--preset", "huge"], "invalid choice"),
        (["--device", "abacus"], "there is no abacus here"),
        (["--resume"], "no unfinished run"),
        (["--nonsense"], "unrecognized arguments"),
    ],
)
def test_bad_options(arguments, complaint, small_world, tmp_path, capsys):
    (tmp_path / "text.txt").write_text("Once upon a time. " * 200, encoding="utf-8")
    usual = ["--data", str(tmp_path / "text.txt"), "--vocab_size", "270", "--block_size", "16", "--out", str(tmp_path / "out")]
    fails(capsys, pretrain.main, [*usual, *arguments], complaint, small_world)
    assert not (tmp_path / "out" / "base.pt").exists()


def test_an_empty_question(small_world, capsys):
    fails(capsys, compare.main, ["--out", str(small_world), "--ask", "  "], "the prompt is empty", small_world)


@pytest.mark.parametrize("script", ["pretrain.py", "sft.py", "compare.py"])
def test_as_a_program(script, tmp_path):
    """From another folder, with a folder that cannot be."""
    (tmp_path / "file").write_text("", encoding="utf-8")
    command = [sys.executable, str(ROOT / script), "--out", str(tmp_path / "file" / "out"), "--device", "cpu"]
    environment = {**os.environ, "PYTHONIOENCODING": "utf-8"}
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, encoding="utf-8", env=environment, timeout=120)
    assert done.returncode == 2 and done.stderr.startswith("error: ") and done.stderr.count("\n") == 1, done.stderr
    assert "Traceback" not in done.stderr
