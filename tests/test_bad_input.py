"""
What the commands say when something is wrong with what they are given: one line, exit code 2, nothing lost. And what is odd but fine.

Each case is a name, a command, its arguments, and what must stand in the error. {tmp} is a folder for the case's own files, {out}
an output folder with a base model, a tuned model and an unfinished run of each stage.
"""

import builtins
import json
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch

import compare
import pretrain
import sft
from conftest import ROOT, SIZES
from data.terminal import command

MAIN = {"pretrain": pretrain.main, "sft": sft.main, "compare": compare.main}
TEXT = "Once upon a time there was a parrot that could not answer. " * 40
PAIR = '{"prompt": "a", "response": "b"}\n'
ON_TEXT = [*SIZES, "--vocab_size", "270", "--block_size", "16", "--out", "{out}", "--data", "{tmp}/good.txt"]
SHORT = ["--device", "cpu", "--out", "{out}"]


def on_text(content, *more):
    """A pretraining whose text file holds these bytes (None: there is no such file)."""
    return "pretrain", ["--data", "{tmp}/my text.txt", *ON_TEXT[:-2], *more], {"my text.txt": content}


def on_talks(content, *more):
    """A fine-tuning whose conversations are these."""
    return "sft", ["--data", "{tmp}/talks.jsonl", *SHORT, *more], {"talks.jsonl": content}


def messages(*turns):
    return json.dumps({"messages": [{"role": role, "content": content} for role, content in turns]}) + "\n"


def changed(**changes):
    """A checkpoint like the good one, but for some parts (None: without them)."""

    def make(good):
        state = {**good, **changes}
        return {key: value for key, value in state.items() if value is not None}

    return make


def twice(good):
    """With a token that occurs twice, so that an ordinary one might take the place of a special one."""
    merges = good["tokenizer"]["merges"]
    return {**good, "tokenizer": {**good["tokenizer"], "merges": [*merges[:-1], merges[-2]]}}


def poisoned(good):
    good["weights"]["embed.weight"][3] = float("nan")
    return good


class Payload:
    """What a pickle would run when it is loaded."""

    def __reduce__(self):
        return open, ("stolen", "w")


NO_FILE = "my text.txt: no such file or folder"
CASES = {
    # text
    "text missing": (*on_text(None), NO_FILE),
    "text empty": (*on_text(b""), "my text.txt: no text in it"),
    "text of white space": (*on_text(b" \n\t\r\n"), "my text.txt: no text in it"),
    "text of a byte order mark": (*on_text("\ufeff".encode()), "no text in it"),
    "text in Latin-1": (*on_text("café ".encode("latin-1") * 100), "my text.txt: not UTF-8 text (byte 3); save it as UTF-8"),
    "text in UTF-16": (*on_text(TEXT.encode("utf-16")), "not UTF-8 text (byte 0)"),
    "text binary": (*on_text(bytes(range(256)) * 20), "not UTF-8 text (byte 128)"),
    "text cut within a character": (*on_text(TEXT.encode() + "고".encode()[:2]), f"not UTF-8 text (byte {len(TEXT)})"),
    "text shorter than a block": (*on_text(b"Once upon a time.", "--block_size", "64", "--vocab_size", "261"), "fewer tokens than a block of 64"),
    "validation shorter than a block": (*on_text(TEXT[:200].encode(), "--vocab_size", "261", "--block_size", "32"), "its validation part holds fewer tokens than a block of 32"),
    "text unreadable": ("pretrain", ["--data", "{tmp}/unreadable.txt", *ON_TEXT[:-2]], {}, "unreadable.txt: cannot be read (Permission denied)"),
    "folder without text": ("pretrain", ["--data", "{tmp}/folder", *ON_TEXT[:-2]], {}, "folder: the folder holds no .txt or .md file"),
    "second text missing": ("pretrain", [*ON_TEXT, "{tmp}/other.txt"], {}, "other.txt: no such file or folder"),
    # conversations
    "talks missing": (*on_talks(None), "talks.jsonl: cannot be read (No such file or directory)"),
    "talks empty": (*on_talks(""), "talks.jsonl: the file holds nothing"),
    "talks an empty array": (*on_talks(" []\n"), "the file holds nothing"),
    "talks a folder": ("sft", ["--data", "{tmp}/folder", *SHORT], {}, "folder: cannot be read (Is a directory)"),
    "talks unreadable": ("sft", ["--data", "{tmp}/unreadable.txt", *SHORT], {}, "cannot be read (Permission denied)"),
    "talks in Latin-1": (*on_talks(PAIR.encode() + '{"prompt": "café'.encode("latin-1")), f"not UTF-8 text (byte {len(PAIR) + 15})"),
    "talks in UTF-16": (*on_talks(PAIR.encode("utf-16")), "not UTF-8 text (byte 0)"),
    "talks binary": (*on_talks(b"PK\x03\x04\x80"), "not UTF-8 text (byte 4)"),
    "JSON cut off": (*on_talks(PAIR + '{"prompt": "a", \n'), "talks.jsonl line 2: broken JSON"),
    "array cut off": (*on_talks('[{"prompt": "a", "response": "b"},\n'), "talks.jsonl line 2: broken JSON"),
    "JSON too deep": (*on_talks(PAIR + '{"a": ' * 100_000 + "\n"), "line 2: broken JSON"),
    "two objects on a line": (*on_talks(PAIR + PAIR.strip() + PAIR), "line 2: broken JSON (Extra data)"),
    "key missing": (*on_talks(PAIR + PAIR + '{"prompt": "a"}\n'), 'talks.jsonl line 3: needs "prompt" and "response"'),
    "key misspelt": (*on_talks('{"promt": "a", "response": "b"}\n'), 'line 1: needs "prompt"'),
    "no object": (*on_talks("[1]"), "talks.jsonl entry 1: a conversation must be an object"),
    "a string": (*on_talks('"hello"\n'), "line 1: a conversation must be an object, not str"),
    "a number for a prompt": (*on_talks('{"prompt": 1, "response": "b"}\n'), "line 1: its texts must be strings"),
    "null for a response": (*on_talks('{"prompt": "a", "response": null}\n'), "line 1: its texts must be strings"),
    "a folder that is none": ("pretrain", ["--data", "{tmp}/" + "x" * 300, *ON_TEXT[:-2]], {}, "cannot be read (File name too long)"),
    "a number for an input": (*on_talks('{"instruction": "a", "input": 5, "output": "b"}\n'), "line 1: its texts must be strings"),
    "empty prompt": (*on_talks('{"prompt": "", "response": "b"}\n'), "line 1: message 1 (user) must have a text"),
    "empty response": (*on_talks('{"prompt": "a", "response": " "}\n'), "line 1: message 2 (assistant) must have a text"),
    "empty conversation": (*on_talks('{"messages": []}\n'), "line 1: a conversation must be a list of at least one message"),
    "messages no list": (*on_talks('{"messages": {"role": "user"}}\n'), "line 1: a conversation must be a list"),
    "message no object": (*on_talks('{"messages": ["hello"]}\n'), "line 1: message 1 must be an object"),
    "a number for a content": (*on_talks(messages(("user", 5), ("assistant", "b"))), "line 1: message 1 (user) must have a text"),
    "no assistant": (*on_talks(PAIR + messages(("user", "a"))), "line 2: the assistant says nothing in it"),
    "unknown role": (*on_talks(messages(("bot", "a"))), "line 1: message 1 has the unknown role 'bot'"),
    "a list for a role": (*on_talks(messages((["user"], "a"))), "line 1: message 1 has the unknown role"),
    "roles out of order": (*on_talks(messages(("assistant", "a"), ("user", "b"))), "line 1: user and assistant must take turns"),
    "system in the middle": (*on_talks(messages(("user", "a"), ("system", "b"), ("assistant", "c"))), "line 1: a system message can only be the first"),
    "nothing fits": (*on_talks('{"prompt": "a", "response": "' + "b " * 500 + '"}\n'), "talks.jsonl: no conversation fits a block of 64 tokens"),
    # checkpoints
    "no base model": ("sft", ["--base", "{tmp}/base.pt", *SHORT], {}, "base.pt: no such checkpoint; make it with python pretrain.py"),
    "nothing to compare": ("compare", ["--out", "{tmp}"], {}, "base.pt: no such checkpoint"),
    "checkpoint a folder": ("sft", ["--base", "{tmp}/folder", *SHORT], {}, "folder: not a checkpoint that can be read"),
    "checkpoint empty": ("sft", ["--base", "{tmp}/base.pt", *SHORT], {"base.pt": b""}, "base.pt: not a checkpoint that can be read"),
    "checkpoint a text": ("compare", ["--base", "{tmp}/base.pt", *SHORT], {"base.pt": b"hello"}, "base.pt: not a checkpoint that can be read"),
    "checkpoint truncated": ("sft", ["--base", "{tmp}/base.pt", *SHORT], {"base.pt": 5000}, "base.pt: not a checkpoint that can be read"),
    "checkpoint of another program": ("sft", ["--base", "{tmp}/base.pt", *SHORT], {"base.pt": {"model": {}}}, "base.pt: not a checkpoint of this program"),
    "checkpoint of another version": (
        "sft", ["--base", "{tmp}/base.pt", *SHORT], {"base.pt": changed(format="parrot checkpoint 99")}, "not a checkpoint of this program"
    ),
    "weights that do not fit": (
        "sft", ["--base", "{tmp}/base.pt", *SHORT], {"base.pt": changed(config=dict(block_size=64, vocab_size=600, n_layer=1, n_head=2, n_embd=64))},
        "base.pt: its parts do not fit together",
    ),
    "a token twice": ("compare", ["--base", "{tmp}/base.pt", "--ask", "a", *SHORT], {"base.pt": twice}, "do not fit together (ValueError: a token occurs twice"),
    "weights that are no numbers": ("compare", ["--base", "{tmp}/base.pt", "--ask", "a", *SHORT], {"base.pt": poisoned}, "a weight is no number"),
    "sizes that are no numbers": ("compare", ["--base", "{tmp}/base.pt", "--ask", "a", *SHORT], {"base.pt": changed(config=dict(n_head=2.0))}, "sizes must be whole"),
    "checkpoint without weights": ("compare", ["--base", "{tmp}/base.pt", "--ask", "a", *SHORT], {"base.pt": changed(weights=None)}, "do not fit together"),
    "checkpoint without a tokenizer": ("compare", ["--base", "{tmp}/base.pt", "--ask", "a", *SHORT], {"base.pt": changed(tokenizer={})}, "do not fit together"),
    "tokenizer that does not fit": (
        "compare", ["--base", "{tmp}/base.pt", "--ask", "a", *SHORT], {"base.pt": changed(tokenizer={"pattern": ".", "merges": ["a", "b"]})},
        "do not fit together",
    ),
    "checkpoint with a payload": ("sft", ["--base", "{tmp}/base.pt", *SHORT], {"base.pt": {"config": Payload()}}, "not a checkpoint that can be read"),
    "a tuned model for a base": ("sft", ["--base", "{out}/sft.pt", *SHORT], {}, "sft.pt: this is a checkpoint of stage 'sft'"),
    "a base for a tuned model": ("compare", ["--out", "{tmp}"], {"base.pt": changed(), "sft.pt": changed()}, "sft.pt: was not tuned from"),
    "asked of another base": ("compare", ["--base", "{tmp}/base.pt", "--ask", "a", *SHORT], {"base.pt": changed(seed=77)}, "sft.pt: was not tuned from"),
    "another world beside the base": ("sft", ["--base", "{tmp}/base.pt", *SHORT], {"base.pt": changed(), "world/sha256": "of another"}, "world: is not of the run"),
    "no world beside the base": ("sft", ["--base", "{tmp}/base.pt", *SHORT], {"base.pt": changed()}, "there is no embedded world beside the base model"),
    "tuned from another base": ("compare", ["--base", "{tmp}/base.pt", *SHORT], {"base.pt": changed(seed=77)}, "sft.pt: was not tuned from"),
    "trained on nobody knows what": ("sft", ["--base", "{tmp}/base.pt", *SHORT], {"base.pt": changed(trained_on=5)}, "base.pt: not a checkpoint of this program"),
    # options
    "n_embd not divisible": ("pretrain", [*ON_TEXT, "--n_embd", "65"], {}, "n_embd (65) must be a multiple of twice n_head"),
    "no layer": ("pretrain", [*ON_TEXT, "--n_layer", "0"], {}, "--n_layer: 0 is out of range; give a whole number from 1"),
    "negative block": ("pretrain", [*ON_TEXT, "--block_size", "-5"], {}, "--block_size: -5 is out of range"),
    "block of one": ("pretrain", [*ON_TEXT, "--block_size", "1"], {}, "--block_size: 1 is out of range"),
    "no step": ("sft", [*SHORT, "--max_steps", "0"], {}, "--max_steps: 0 is out of range"),
    "layers in words": ("pretrain", [*ON_TEXT, "--n_layer", "two"], {}, "invalid int value: 'two'"),
    "learning rate no number": ("sft", [*SHORT, "--lr", "nan"], {}, "--lr: nan is out of range"),
    "dropout of everything": ("pretrain", [*ON_TEXT, "--dropout", "1"], {}, "--dropout: 1.0 is out of range"),
    "negative seed": ("pretrain", [*ON_TEXT, "--seed", "-1"], {}, "--seed: -1 is out of range"),
    "wider than memory": ("pretrain", [*ON_TEXT, "--n_embd", "1000000000"], {}, "memory: it does not suffice; lower --batch_size"),
    "vocabulary under 261": ("pretrain", [*ON_TEXT, "--vocab_size", "260"], {}, "--vocab_size: vocab_size 260 is under 261"),
    "vocabulary over the text": ("pretrain", [*ON_TEXT, "--vocab_size", "60000"], {}, "the text supports a vocab_size of"),
    "unknown tokenizer": ("pretrain", [*ON_TEXT, "--tokenizer", "nonsense"], {}, "--tokenizer: tiktoken has no encoding 'nonsense'; choose one of "),
    "unknown preset": ("pretrain", [*ON_TEXT, "--preset", "huge"], {}, "invalid choice: 'huge'"),
    "unknown option": ("sft", [*SHORT, "--nonsense"], {}, "unrecognized arguments: --nonsense"),
    "device that is not there": ("pretrain", [*ON_TEXT, "--device", "abacus"], {}, "--device: there is no abacus here; use "),
    "device not here for sft": ("sft", ["--out", "{out}", "--device", "cuda:77"], {}, "--device: there is no cuda:77 here; use "),
    "output in a file": ("pretrain", [*ON_TEXT, "--out", "{tmp}/good.txt/out"], {}, "train.bin: cannot be written (Not a directory)"),
    "output a file": ("sft", ["--base", "{out}/base.pt", "--out", "{tmp}/good.txt"], {}, "cannot be written (File exists)"),
    "empty question": ("compare", [*SHORT, "--ask", "  "], {}, "--ask: the prompt is empty"),
    "unknown side": ("compare", [*SHORT, "--side", "left"], {}, "invalid choice: 'left'"),
    "steps beyond all numbers": ("pretrain", [*ON_TEXT, "--lr", "1e300"], {}, "--lr: 1e+300 is out of range"),
    "batch beyond all numbers": ("pretrain", [*ON_TEXT, "--batch_size", "9223372036854775807"], {}, "--batch_size: 9223372036854775807 is out of range"),
    "folder without a name": ("pretrain", [*ON_TEXT, "--out", ""], {}, "argument --out: must not be empty"),
    "text without a name": ("pretrain", ["--data", "", *ON_TEXT[:-2]], {}, "argument --data: must not be empty"),
    "name too long": ("sft", ["--base", "{tmp}/" + "x" * 300, *SHORT], {}, "File name too long; check the path"),
    # what is read must not be written over
    "text in the output's place": ("pretrain", ["--data", "{tmp}/train.bin", *ON_TEXT[:-4], "--out", "{tmp}"], {"train.bin": TEXT}, "train.bin: would be overwritten"),
    "talks in the log's place": ("sft", ["--data", "{tmp}/sft.jsonl", "--base", "{out}/base.pt", "--out", "{tmp}"], {"sft.jsonl": PAIR}, "sft.jsonl: would be overwritten"),
    "base in the tuned model's place": ("sft", ["--data", "{tmp}/t.jsonl", "--base", "{tmp}/sft.pt", "--out", "{tmp}"], {"t.jsonl": PAIR, "sft.pt": changed()}, "sft.pt: would be overwritten"),
    # going on with a run
    "nothing to resume": ("pretrain", [*ON_TEXT[:-4], "--out", "{tmp}/folder", *ON_TEXT[-2:], "--resume"], {}, "--resume: there is no unfinished run"),
    "nothing to resume for sft": ("sft", ["--base", "{out}/base.pt", "--out", "{tmp}", "--resume"], {}, "--resume: there is no unfinished run"),
    "another setting": ("pretrain", [*ON_TEXT, "--max_steps", "40", "--lr", "0.5", "--resume"], {}, "--resume: lr was 0.02 and is now 0.5; run with the same"),
    "another text": (
        "pretrain", ["--data", "{tmp}/my text.txt", *ON_TEXT[:-2], "--max_steps", "40", "--resume"], {"my text.txt": TEXT.upper()},
        "--resume: text_sha256 was ",
    ),
    "other conversations": (*on_talks(PAIR * 40, "--max_steps", "40", "--resume"), "--resume: data_sha256 was "),
    "no unfinished run of ours": (
        "pretrain", [*ON_TEXT[:-4], "--out", "{tmp}", *ON_TEXT[-2:], "--resume"], {"pretrain.resume.pt": {"step": 3}}, "not an unfinished run of this program"
    ),
    "unfinished run damaged": (
        "pretrain", [*ON_TEXT[:-4], "--out", "{tmp}", *ON_TEXT[-2:], "--resume"], {"pretrain.resume.pt": b"PK"}, "not a checkpoint that can be read"
    ),
}  # fmt: skip
AS_PROGRAMS = [
    "text missing", "text in Latin-1", "JSON cut off", "no assistant", "no base model", "checkpoint with a payload", "unknown preset",
    "output in a file", "empty question", "nothing to resume",
]  # fmt: skip


@pytest.fixture(scope="module")
def finished(small_world, tmp_path_factory):
    """A copy of the small run's folder, with an unfinished run of each stage in it."""
    out = tmp_path_factory.mktemp("finished") / "out"
    shutil.copytree(small_world, out)
    other = tmp_path_factory.mktemp("other")
    (other / "good.txt").write_text(TEXT, encoding="utf-8")
    (other / "talks.jsonl").write_text(PAIR * 30, encoding="utf-8")
    calls = []

    def killed(*arguments):
        calls.append(arguments)
        if len(calls) % 2 == 0:  # the second log row of a run
            raise SystemExit(137)
        return log_row(*arguments)

    log_row = pretrain.Run.log_row
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pretrain, "SAVE_EVERY", 0)
        patch.setattr(pretrain.Run, "log_row", killed)
        fill = lambda arguments: [a.format(tmp=other, out=other) for a in arguments]
        with pytest.raises(SystemExit):
            pretrain.main([*fill(ON_TEXT), "--max_steps", "40"])
        with pytest.raises(SystemExit):
            sft.main([*fill(SHORT), "--base", str(out / "base.pt"), "--data", str(other / "talks.jsonl"), "--max_steps", "40"])
    for name in ("pretrain.resume.pt", "sft.resume.pt"):
        shutil.copy(other / name, out / name)
    return out


def contents(*folders):
    return {path: path.read_bytes() if path.is_file() else None for folder in folders for path in folder.rglob("*")}


@pytest.mark.parametrize("case", [*CASES, *(f"{name} (as a program)" for name in AS_PROGRAMS)])
def test_bad_input(case, finished, tmp_path, capsys, monkeypatch):
    as_a_program = case.endswith(" (as a program)")
    program, arguments, files, complaint = CASES[case.removesuffix(" (as a program)")]
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    (tmp_path / "good.txt").write_text(TEXT, encoding="utf-8")
    (tmp_path / "unreadable.txt").write_text(TEXT, encoding="utf-8")
    for name, content in files.items():
        if callable(content):
            content = content(torch.load(finished / "base.pt", weights_only=True))
        if isinstance(content, int):
            content = (finished / "base.pt").read_bytes()[:content]
        (tmp_path / name).parent.mkdir(exist_ok=True)
        if isinstance(content, dict):
            torch.save(content, tmp_path / name)
        elif content is not None:
            (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    arguments = [argument.format(tmp=tmp_path, out=finished) for argument in arguments]
    before = contents(finished, tmp_path)

    if as_a_program:
        environment = {**os.environ, "PYTHONIOENCODING": "utf-8"}
        run = [sys.executable, str(ROOT / f"{program}.py"), *arguments]
        done = subprocess.run(run, cwd=tmp_path, capture_output=True, encoding="utf-8", env=environment, timeout=120)
        code, errors = done.returncode, done.stderr
    else:
        real_open, unreadable = builtins.open, (tmp_path / "unreadable.txt",)
        monkeypatch.setattr(builtins, "open", lambda path, *a, **k: refuse(path) if path in unreadable else real_open(path, *a, **k))
        with pytest.raises(SystemExit) as stopped:
            MAIN[program](arguments)
        monkeypatch.undo()
        code, errors = stopped.value.code, capsys.readouterr().err

    lines = errors.splitlines()
    assert code == 2 and len(lines) == 1, errors
    where_and_what, _, what_to_do = lines[0].rpartition("; ")
    assert where_and_what.startswith("error: ") and where_and_what.count(": ") >= 2 and what_to_do
    assert complaint in lines[0], lines[0]
    assert contents(finished, tmp_path) == before


def refuse(path):
    """As it is with a file of somebody else's. (Who runs the tests may be root, whom no permission stops.)"""
    raise PermissionError(13, "Permission denied", str(path))


def test_programming_errors_keep_their_traceback():
    @command
    def main(argv=None):
        raise KeyError("a bug of ours")

    with pytest.raises(KeyError):
        main([])


ODD = {
    "byte order mark": ("my text.txt", b"\xef\xbb\xbf" + TEXT.encode()),
    "Windows line ends": ("my text.txt", TEXT.replace(". ", ".\r\n").encode()),
    "old Macintosh line ends": ("my text.txt", TEXT.replace(". ", ".\r").encode()),
    "no final newline": ("my text.txt", TEXT.strip().encode()),
    "a line of ten megabytes": ("my text.txt", TEXT.encode() * (10_000_000 // len(TEXT))),
    "a word of a megabyte": ("my text.txt", b"a" * 1_000_000 + TEXT.encode()),
    "null characters": ("my text.txt", TEXT.replace(" ", "\0").encode()),
    "control tokens": ("my text.txt", TEXT.replace("parrot", "<|endoftext|><|user|><|end|>").encode()),
    "a name with spaces": ("my own text.txt", TEXT.encode()),
    "a Korean name and text": ("한국어 글.txt", "옛날 옛적에 앵무새 한 마리가 살았다. ".encode() * 100),
    "an emoji name and text": ("🦜.txt", "🦜🦜🙂 said the parrot. ".encode() * 100),
}


@pytest.mark.parametrize("case", ODD)
def test_odd_but_fine_text(case, tmp_path):
    name, content = ODD[case]
    (tmp_path / name).write_bytes(content)
    sizes = "--n_layer 1 --n_embd 16 --block_size 16 --vocab_size 262 --batch_size 2 --max_steps 1 --device cpu".split()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compare, "text_loss", lambda *arguments: (1.0, 1.0))  # (a megabyte of validation takes its time)
        pretrain.main(["--data", str(tmp_path / name), "--out", str(tmp_path / "out"), *sizes])
    tokenizer = compare.load(tmp_path / "out" / "base.pt")[1]
    ids = np.concatenate([np.fromfile(tmp_path / "out" / f"{part}.bin", "<u2")[1:] for part in ("train", "val")])
    assert (ids < tokenizer.endoftext).all()
    text = tokenizer.decode(ids.tolist())
    assert text == content.decode("utf-8-sig").replace("\r\n", "\n").replace("\r", "\n")


def test_odd_but_fine_conversations(small_world, tmp_path):
    talks = [
        {"prompt": "안녕? 🦜", "response": "a\u2028b\n"},
        {"messages": [{"role": "system", "content": "s"}, {"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}], "id": 7},
        {"instruction": "a", "input": None, "output": "b"},
        {"prompt": "lone \ud800 surrogate", "response": "\0"},
        {"prompt": "<|end|>", "response": "<|user|>"},
    ]
    (tmp_path / "내 대화.jsonl").write_bytes(b"\xef\xbb\xbf" + b"\r\n\r\n".join(json.dumps(t).encode() for t in talks))
    arguments = ["--data", str(tmp_path / "내 대화.jsonl"), "--base", str(small_world / "base.pt"), "--out", str(tmp_path / "out 폴더")]
    sft.main([*arguments, "--max_steps", "2", "--device", "cpu"])
    compare.main(["--out", str(tmp_path / "out 폴더"), "--base", str(small_world / "base.pt"), "--ask", "lone \udcff byte?"])
    assert (tmp_path / "out 폴더" / "sft.pt").exists()
