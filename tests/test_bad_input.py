"""
What the commands say when something is wrong with what you give them: one line, exit code 2, and
nothing is lost. Then inputs that look odd but are fine.
"""

import builtins
import io
import json
import os
import shutil
import subprocess
import sys
import zipfile

import numpy as np
import pytest
import torch

import common.run
import compare
import dpo
import pretrain
import sft
from common.device import memory_of
from common.messages import InputError, command
from common.presets import PRESETS
from conftest import ROOT, SIZES
from data import world
from data.world import questions

MAIN = {"pretrain": pretrain.main, "sft": sft.main, "dpo": dpo.main, "own": dpo.main}
MAIN["compare"] = compare.main
TEXT = "Once upon a time there was a parrot that could not answer. " * 40
PAIR = '{"prompt": "a", "response": "b"}\n'
TINY = " ".join(SIZES) + " --vocab_size 270 --block_size 16"
USUAL = {  # what each command gets before the options of a case, which may override it
    "pretrain": f"--device cpu --data {{tmp}}/good.txt {TINY} --out {{out}}",
    "sft": "--device cpu --out {out}",
    "dpo": "--device cpu --sft {out}/sft.pt --data {tmp}/pairs.jsonl --out {tmp}/new",
    "own": "",  # dpo.py without --data
    "compare": "--device cpu --out {out}",
}
FIFO, LOOP = object(), object()  # instead of the content of a file
CASES = {}


def case(name, typed, complaint, files=None):
    """Add a case.

    typed: the command and its options. {tmp} is a folder for the files of this case, {text} a file
    in it. {out} has a base model, a tuned model and an unfinished run of each stage.
    complaint: what the error must say. files: {name: content}; a function makes the content from
    {out}, and None means that there is no such file.
    """
    assert name not in CASES
    CASES[name] = typed, complaint, files or {}


def rows(table):
    """The rows of a table, whose cells have " -> " between them."""
    return [[cell.strip() for cell in row.split(" -> ")] for row in table.strip().split("\n")]


# -------------------------------------------------------------------------------------------------
# Text


def bad_text(name, content, complaint, options=""):
    typed = f"pretrain --data {{text}} {options}"
    case(f"text {name}", typed, f"my text.txt: {complaint}", {"my text.txt": content})


CAFE, CUT = "café ".encode("latin-1"), TEXT.encode() + "고".encode()[:2]
SHORTER = "has fewer tokens than a block of"
bad_text("missing", None, "no such file or folder; check the path")
bad_text("empty", b"", "no text in it")
bad_text("of white space", b" \n\t\r\n", "no text in it")
bad_text("of a byte order mark", "\ufeff", "no text in it")
bad_text("in Latin-1", CAFE * 100, "not UTF-8 text (byte 3); save it as UTF-8")
bad_text("in UTF-16", TEXT.encode("utf-16"), "not UTF-8 text (byte 0)")
bad_text("binary", bytes(range(256)) * 20, "not UTF-8 text (byte 128)")
bad_text("cut within a character", CUT, f"not UTF-8 text (byte {len(TEXT)})")
bad_text("shorter than a block", "Once upon", f"its training part {SHORTER} 16", "--vocab_size 261")
bad_text("of few blocks", TEXT[:100], f"its validation part {SHORTER} 16", "--vocab_size 261")
bad_text("a FIFO", FIFO, "not a regular file")
bad_text("a loop of links", LOOP, "cannot be read (Too many levels of symbolic links)")
for path, complaint in {
    "{tmp}/unreadable.txt": "unreadable.txt: cannot be read (Permission denied)",
    "{tmp}/folder": "folder: the folder holds no .txt or .md file",
    "{tmp}/good.txt {tmp}/other.txt": "other.txt: no such file or folder",
    "{tmp}/" + "x" * 300: "x: cannot be read (File name too long)",
    "{tmp}/a\0b": "argument --data: must not contain a NUL byte",
    "{nothing}": "argument --data: must not be empty",
}.items():
    case(f"text at {path[:20]!r}", f"pretrain --data {path}", complaint)


# -------------------------------------------------------------------------------------------------
# Conversations


def bad_talks(name, content, complaint):
    typed, files = "sft --data {tmp}/talks.jsonl", {"talks.jsonl": content}
    case(f"conversations {name}", typed, f"talks.jsonl{complaint}", files)


DEEP, DEEPER = ("[" * levels + "]" * levels for levels in (1000, 100_000))
LATIN_1 = PAIR.encode() + '{"prompt": "café'.encode("latin-1")
LONG = '{"prompt": "a", "response": "%s"}' % ("b " * 500)
bad_talks("missing", None, ": no such file or folder")
bad_talks("empty", "", ": the file holds nothing")
bad_talks("in an empty array", " []\n", ": the file holds nothing")
bad_talks("in a FIFO", FIFO, ": not a regular file")
bad_talks("in a loop of links", LOOP, ": cannot be read (Too many levels of symbolic links)")
bad_talks("in Latin-1", LATIN_1, f": not UTF-8 text (byte {len(PAIR) + 15})")
bad_talks("in UTF-16", PAIR.encode("utf-16"), ": not UTF-8 text (byte 0)")
bad_talks("binary", b"PK\x03\x04\x80", ": not UTF-8 text (byte 4)")
bad_talks("cut off", PAIR + '{"prompt": "a", \n', " line 2: broken JSON")
bad_talks("in an array cut off", f"[{PAIR.strip()},\n", " line 2: broken JSON")
bad_talks("two on a line", PAIR + PAIR.strip() + PAIR, " line 2: broken JSON (Extra data)")
bad_talks("with a deep line", f'{PAIR}{{"a": {DEEP}}}\n', " line 2: broken JSON")
bad_talks("with a deeper line", f'{PAIR}{{"a": {DEEPER}}}\n', " line 2: broken JSON")
bad_talks("with an open, deeper line", PAIR + '{"a": ' * 100_000, " line 2: broken JSON")
BLOCK = SIZES[SIZES.index("--block_size") + 1]
bad_talks("too long", LONG, f": no conversation fits {BLOCK} tokens")
bad_talks("without a key", PAIR * 2 + '{"prompt": "a"}', ' line 3: needs "messages"')
bad_talks("in an array of numbers", "[1]", " entry 1: a conversation must be an object")
for name, content in {
    "in a deep array": DEEP,
    "in a deeper array": DEEPER,
    "with a deep entry": f"[{PAIR}, {DEEP}]",
    "with a deeper entry": f"[{PAIR}, {DEEPER}]",
}.items():  # either Python's parser gives up, or our own check objects
    case(name, "sft --data {tmp}/deep.json", " levels deep); ", {"deep.json": content})
case("conversations in a folder", "sft --data {tmp}/folder", "folder: cannot be read (Is a direct")
case("conversations unreadable", "sft --data {tmp}/unreadable.txt", "cannot be read (Permission de")

# The first line of a file, and what is wrong with it.
for line, complaint in rows(
    """
    "hello" -> a conversation must be an object, not str
    {"promt": "a", "response": "b"} -> needs "messages"
    {"prompt": 1, "response": "b"} -> every text in a conversation must be a string
    {"prompt": "a", "response": null} -> every text in a conversation must be a string
    {"instruction": "a", "input": 5, "output": "b"} -> every text in a conversation must be a string
    {"prompt": "", "response": "b"} -> message 1 (user) must have text in it
    {"prompt": "a", "response": " "} -> message 2 (assistant) must have text in it
    {"messages": []} -> a conversation must be a list of at least one message
    {"messages": {"role": "user"}} -> a conversation must be a list
    {"messages": ["hello"]} -> message 1 must be an object
    """
):
    bad_talks(line, line, f" line 1: {complaint}")

# The roles and texts of a conversation, and what is wrong with them.
for turns, complaint in rows(
    """
    [["user", 5], ["assistant", "b"]] -> message 1 (user) must have text in it
    [["user", "a"]] -> there is no answer
    [["bot", "a"]] -> message 1 has the unknown role 'bot'
    [[["user"], "a"]] -> message 1 has the unknown role
    [["assistant", "a"], ["user", "b"]] -> user and assistant must take turns
    [["user", "a"], ["system", "b"], ["assistant", "c"]] -> only the first message can be a system
    """
):
    messages = [{"role": role, "content": content} for role, content in json.loads(turns)]
    line = json.dumps({"messages": messages})
    bad_talks(turns, PAIR + line, f" line 2: {complaint}")


# -------------------------------------------------------------------------------------------------
# Pairs of answers


def bad_pairs(name, content, complaint, options=""):
    case(f"pairs {name}", f"dpo {options}", f"pairs.jsonl{complaint}", {"pairs.jsonl": content})


CHOICE = '{"prompt": "a", "chosen": "b", "rejected": "c"}\n'
bad_pairs("missing", None, ": no such file or folder")
bad_pairs("empty", " \n", ": the file holds nothing")
bad_pairs("in a FIFO", FIFO, ": not a regular file")
bad_pairs("in UTF-16", CHOICE.encode("utf-16"), ": not UTF-8 text (byte 0)")
bad_pairs("cut off", CHOICE + CHOICE[:30], " line 2: broken JSON")
bad_pairs("in an array, with a number", f"[{CHOICE}, 5]", " entry 2: a pair must be an object")
bad_pairs("too long", CHOICE.replace("b", "b " * 500), f": no pair fits {BLOCK} tokens")
TURNS = [{"role": role, "content": role[0]} for role in ("user", "assistant", "user")]
UNLEARNED = [*TURNS, {"role": "assistant", "content": "c", "weight": 0}]
for line, complaint in rows(
    f"""
    "hello" -> a pair must be an object with "prompt", "chosen" and "rejected"
    {{"prompt": "a", "chosen": "b"}} -> a pair must be an object with
    {{"prompt": "a", "rejected": "b"}} -> a pair must be an object with
    {{"prompt": "a", "response": "b"}} -> a pair must be an object with
    {{"chosen": "b", "rejected": "c"}} -> "prompt" and "chosen" must each be a text or a list
    {{"prompt": 5, "chosen": "b", "rejected": "c"}} -> "prompt" and "chosen" must each be a text
    {{"prompt": "a", "chosen": null, "rejected": "c"}} -> "prompt" and "chosen" must each be a text
    {{"prompt": "a", "chosen": "b", "rejected": {{}}}} -> "prompt" and "rejected" must each
    {{"prompt": "a", "chosen": "b", "rejected": "b"}} -> both answers are the same
    {{"prompt": " ", "chosen": "b", "rejected": "c"}} -> message 1 (user) must have text in it
    {{"prompt": "a", "chosen": "", "rejected": "c"}} -> message 2 (assistant) must have text in it
    {{"prompt": "a", "chosen": "b", "rejected": "\\n"}} -> message 2 (assistant) must have text
    {{"prompt": [], "chosen": "b", "rejected": "c"}} -> user and assistant must take turns
    {{"prompt": ["a"], "chosen": "b", "rejected": "c"}} -> message 1 must be an object
    {{"prompt": "a", "chosen": ["b"], "rejected": "c"}} -> message 2 must be an object
    {{"prompt": "a", "chosen": [], "rejected": "c"}} -> there is no answer
    {{"prompt": "a", "chosen": {json.dumps(TURNS)}, "rejected": "c"}} -> "chosen" must end with an
    {{"prompt": "a", "chosen": {json.dumps(TURNS[:2])}, "rejected": "c"}} -> the two conversations
    {{"chosen": {json.dumps(UNLEARNED)}, "rejected": {json.dumps(TURNS)}}} -> "chosen" must end
    """
):
    bad_pairs(line, CHOICE + line, f" line 2: {complaint}")


# -------------------------------------------------------------------------------------------------
# Checkpoints


def good(name):
    def make(out):
        return (out / name).read_bytes()

    return make


def cut(name, n_bytes):
    def make(out):
        return (out / name).read_bytes()[:n_bytes]

    return make


def changed(name="base.pt", **changes):
    """A checkpoint like the good one, except for some parts. None: without that part."""

    def make(out):
        state = {**torch.load(out / name, weights_only=True), **changes}
        return {key: value for key, value in state.items() if value is not None}

    return make


def changed_part(part, name="base.pt", **changes):
    """The same for "config", "tokenizer" or "weights", each a dict."""

    def make(out):
        state = torch.load(out / name, weights_only=True)
        state[part].update(changes)
        state[part] = {key: value for key, value in state[part].items() if value is not None}
        return state

    return make


def with_merges(change, name="base.pt"):
    """With other tokens in the tokenizer. change(merges) returns them."""

    def make(out):
        state = torch.load(out / name, weights_only=True)
        state["tokenizer"]["merges"] = change(state["tokenizer"]["merges"])
        return state

    return make


def with_nan(out):
    state = torch.load(out / "base.pt", weights_only=True)
    state["weights"]["embed.weight"][3] = float("nan")
    return state


def repeated(out):
    """A file of 20 kB whose weights would take 40 GB."""
    state = torch.load(out / "base.pt", weights_only=True)
    n_vocab, n_embd = state["weights"]["embed.weight"].shape
    state["weights"]["embed.weight"] = torch.zeros(1).expand(n_vocab, 10**10 // n_vocab)
    return state


def with_a_flipped_bit(out):
    """In the first weights: torch.load would not notice."""
    weights = torch.load(out / "base.pt", weights_only=True)["weights"]["embed.weight"]
    content = bytearray((out / "base.pt").read_bytes())
    content[content.index(weights.numpy().tobytes()[:64])] ^= 1
    return bytes(content)


def shared(out):
    """40 lists that hold 2**40 of each other."""
    about = []
    for _ in range(40):
        about = [about, about]
    return {**torch.load(out / "base.pt", weights_only=True), "extra": about}


def zipped(out):
    """The same, but a packed file may be tiny and take gigabytes."""
    packed = io.BytesIO()
    with (
        zipfile.ZipFile(out / "base.pt") as file,
        zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as other,
    ):
        for name in file.namelist():
            other.writestr(name, file.read(name))
    return packed.getvalue()


def nested(out):
    about = []
    for _ in range(300):
        about = [about]
    return {**torch.load(out / "base.pt", weights_only=True), "trained_on": {"files": about}}


class Payload:
    """A pickle that opens a file when it is loaded."""

    def __reduce__(self):
        return open, ("stolen", "w")


UNREADABLE = "base.pt: not a readable checkpoint"
NOT_OURS = "base.pt: not a checkpoint of this program"
MISFIT = "base.pt: its parts do not fit together"
BASES = {
    "none": (None, "base.pt: no such checkpoint; make it with python pretrain.py"),
    "empty": (b"", UNREADABLE),
    "a text": (b"hello", UNREADABLE),
    "truncated": (cut("base.pt", 5000), UNREADABLE),
    "with a flipped bit": (with_a_flipped_bit, UNREADABLE),
    "with 2**40 lists": (shared, UNREADABLE),
    "in a packed archive": (zipped, UNREADABLE),
    "with 300 levels": (nested, UNREADABLE),
    "with a number repeated": (repeated, f"{MISFIT} (ValueError: the weights are larger than"),
    "with a payload": ({"config": Payload()}, UNREADABLE),
    "a FIFO": (FIFO, "base.pt: not a regular file"),
    "a loop of links": (LOOP, "base.pt: no such checkpoint"),
    "of another program": ({"model": {}}, NOT_OURS),
    "of another version": (changed(format="parrot checkpoint 99"), NOT_OURS),
    "trained on a number": (changed(trained_on=5), NOT_OURS),
    "a tuned model": (good("sft.pt"), "base.pt: this is a "),
    "without weights": (changed(weights=None), MISFIT),
    "without a tokenizer": (changed(tokenizer={}), MISFIT),
    "without sizes": (changed(config=None), MISFIT),
    "with fewer layers": (changed_part("config", n_layer=1), MISFIT),
    "with 10**9 layers": (changed_part("config", n_layer=10**9), MISFIT),
    "with a vocabulary of 10**12": (changed_part("config", vocab_size=10**12), MISFIT),
    "with a block of 10**12": (changed_part("config", block_size=10**12), MISFIT),
    "with a width of 10**12": (changed_part("config", n_embd=10**12), MISFIT),
    "with half a head": (changed_part("config", n_head=0.5), MISFIT),
    "with minus one head": (changed_part("config", n_head=-1), MISFIT),
    "with a text for a size": (changed_part("config", block_size="64"), MISFIT),
    "with a dropout of NaN": (changed_part("config", dropout=float("nan")), MISFIT),
    "with a tensor for dropout": (changed_part("config", dropout=torch.tensor(0.1)), MISFIT),
    "with an odd size": (changed_part("config", **{"out of memory": 1}), MISFIT),
    "with a text for dropout": (changed_part("config", dropout="much"), MISFIT),
    "without n_head": (changed_part("config", n_head=None), MISFIT),  # any number would fit
    "without dropout": (changed_part("config", dropout=None), MISFIT),
    "with one size too many": (changed_part("config", n_legs=2), MISFIT),
    "with a NaN": (with_nan, f"{MISFIT} (ValueError: a weight is NaN or infinite)"),
    "with a text for a weight": (changed_part("weights", **{"embed.weight": "hello"}), MISFIT),
    "with a list of weights": (changed(weights=[1.0]), MISFIT),
    "with a token twice": (
        with_merges(lambda merges: [*merges[:-1], merges[-2]]),
        f"{MISFIT} (ValueError: a token occurs twice",
    ),
    "with a token too few": (with_merges(lambda merges: merges[:-1]), MISFIT),
    "with two tokens only": (with_merges(lambda merges: merges[:2]), MISFIT),
    "with a number for a token": (with_merges(lambda merges: [*merges[:-1], 5]), MISFIT),
    "with an empty pattern": (changed_part("tokenizer", pattern=""), MISFIT),
    "with a pattern that matches nothing": (changed_part("tokenizer", pattern="(?!)"), MISFIT),
    "with a pattern that loses text": (changed_part("tokenizer", pattern=r"\p{L}+"), MISFIT),
    "with a broken pattern": (changed_part("tokenizer", pattern="("), MISFIT),
    "with a pattern that never ends": (
        changed_part("tokenizer", pattern=r"(?:[ -~]|[ -~])+\x00|[\s\S]"),
        MISFIT,
    ),
    "with a number for a pattern": (changed_part("tokenizer", pattern=5), MISFIT),
}
for name, (content, complaint) in BASES.items():
    base = {"base.pt": content}
    case(f"sft.py, base model {name}", "sft --base {tmp}/base.pt", complaint, base)
    case(f"compare.py, base model {name}", "compare --base {tmp}/base.pt --ask a", complaint, base)


def bad_tuned(name, content, complaint):
    files = {"base.pt": good("base.pt"), "sft.pt": content}
    case(f"tuned model {name}", "compare --out {tmp}", f"sft.pt: {complaint}", files)


def swap_two(merges):
    return [*merges[:-2], merges[-1], merges[-2]]


for name, content, complaint in (
    ("none", None, "tuned.pt: no such checkpoint"),
    (
        "a base model",
        good("base.pt"),
        "tuned.pt: this is a checkpoint of stage 'base'; name a tuned",
    ),
    ("of stage 3", changed("sft.pt", stage="dpo"), "tuned.pt: this is a checkpoint of stage 'dpo'"),
    ("truncated", cut("sft.pt", 5000), "tuned.pt: not a readable checkpoint"),
):
    files = {"tuned.pt": content, "pairs.jsonl": CHOICE}
    case(f"dpo.py, tuned model {name}", "dpo --sft {tmp}/tuned.pt", complaint, files)

ORPHAN = {"sft.pt": changed("sft.pt", base="gone/base.pt")}
PAIRLESS = "--device cpu --sft {tmp}/sft.pt --out {tmp}/new"
STAGES = {"base.pt": good("base.pt"), "sft.pt": good("sft.pt")}
case(
    "dpo.py, no base model",
    "own " + PAIRLESS,
    "sft.pt: its base model is missing: no gone/base.pt",
    ORPHAN,
)
case("dpo.py, no world", "own " + PAIRLESS, "there is no embedded world beside the base", STAGES)
case(
    "dpo.py, another base model",
    "own " + PAIRLESS,
    "sft.pt: was tuned from another base model",
    {**STAGES, "base.pt": changed(seed=77)},
)
THIRD = {**STAGES, "dpo.pt": good("base.pt")}
case("compare.py, dpo.pt a base model", "compare --out {tmp}", "dpo.pt: was not made by dpo", THIRD)
case("compare.py, no stage 3", "compare --stage dpo --ask a", "--stage: ")

OTHER_BASE = {"base.pt": changed(seed=77)}
bad_tuned("none", None, "no such checkpoint; make it with python sft.py")
bad_tuned("a FIFO", FIFO, "not a regular file")
bad_tuned("a base model", good("base.pt"), "this is a base model")
bad_tuned("of another vocabulary", with_merges(swap_two, "sft.pt"), "its vocabulary differs from")
bad_tuned(
    "with a tensor to show", changed("sft.pt", examples=torch.ones(3)), "its examples are not"
)
bad_tuned("with a number to show", changed("sft.pt", examples=[1]), "its examples are not a list")
GIVEN, ASKED = "compare --base {tmp}/base.pt", "compare --base {tmp}/base.pt --ask a"
case("compared with another base model", GIVEN, "sft.pt: was tuned from another base", OTHER_BASE)
case("asked of another base model", ASKED, "sft.pt: was tuned from another base", OTHER_BASE)
case("base model gone", "compare --out {tmp}", "sft.pt: its base model is missing", ORPHAN)
case("no models", "compare --out {tmp}", "base.pt: no such checkpoint")
case("base model in a folder", "sft --base {tmp}/folder", "cannot be read (Is a directory)")
case("base model with a long name", "sft --base {tmp}/" + "x" * 300, "File name too long")
case("NUL, sft.py", "sft --base {tmp}/a\0b", "--base: must not contain a NUL byte")
case("NUL, compare.py", "compare --out {tmp}/a\0b", "base.pt: no such checkpoint")


# -------------------------------------------------------------------------------------------------
# The embedded world: people add questions of their own to its files


NAMES = ["sha256", *(f"{name}.jsonl" for name in ("sft", "train", "dev", "test", "smalltalk"))]
WHOLE = {path: good(path) for path in ("base.pt", "sft.pt", *(f"world/{n}" for n in NAMES))}


def edited(name, /, question=None, **changes):
    """A file of JSON Lines whose third line has other values. None: without that key.

    question: instead of the third line.
    """

    def make(out):
        lines = (out / "world" / name).read_text(encoding="utf-8").splitlines()
        lines[2] = json.dumps(changed_line(question or json.loads(lines[2]), changes))
        return "\n".join(lines) + "\n"

    return make


def changed_line(line, changes):
    return {key: value for key, value in {**line, **changes}.items() if value is not None}


def bad_world(program, name, content, complaint):
    """A program that reads a world with this content in one of its files."""
    typed = f"{program} --out {{tmp}}"
    if program == "sft":  # it would replace the good sft.pt
        typed += "/new --base {tmp}/base.pt"
    elif name == "dev.jsonl":
        typed += " --side dev"
    what = f"{program}.py, {name}: {complaint}"
    case(what, typed, f"{name}{complaint}", {**WHOLE, f"world/{name}": content})


def bad_question(program, name, complaint, /, question=None, **changes):
    bad_world(program, name, edited(name, question, **changes), f" line 3: {complaint}")


# sft.py reads conversations. In dev.jsonl, they are the prompts and their responses.
bad_world("sft", "sft.jsonl", "", ": the file holds nothing")
bad_world("sft", "dev.jsonl", None, ": no such file or folder")
NEEDS, TEXTS = 'needs "messages", "prompt"', "every text in a conversation must be a string"
bad_question("sft", "sft.jsonl", NEEDS, messages=None, prompt=None)
bad_question("sft", "sft.jsonl", TEXTS, messages=None, prompt=5, response="a")
bad_question("sft", "sft.jsonl", "a conversation must be a list", messages="hello")
bad_question("sft", "dev.jsonl", '"prompt" is missing', prompt=None)
bad_question("sft", "dev.jsonl", '"response" must be text', response=["a"])

bad_world("compare", "test.jsonl", None, ": no such file or folder")
bad_world("compare", "test.jsonl", "", ": the file holds nothing")
bad_world("compare", "test.jsonl", '"a"\n', " line 1: not a JSON object")
bad_world("compare", "smalltalk.jsonl", "hello\n", " line 1: broken JSON")
bad_question("compare", "test.jsonl", 'no table "rivers"', table="rivers")
bad_question("compare", "test.jsonl", "no ", accept=["Atlantis"])
bad_question("compare", "test.jsonl", '"keys" must be a list of lists of texts', keys=[1, 2])
bad_question("compare", "test.jsonl", '"accept" must be a list of texts', accept=None)
for name in ("train.jsonl", "dev.jsonl", "test.jsonl", "smalltalk.jsonl"):
    bad_question("compare", name, '"prompt" is missing', prompt=None)
    bad_question("compare", name, '"response" must be text', response=[1])

# A good question of each kind, as somebody might add it.
ASKED = {"prompt": "What is the capital of Kenya?", "name": "Kenya"}
ASKED |= {"table": "countries", "attribute": "capital", "accept": ["Nairobi"]}
TOLD = "The capital of Kenya is Nairobi."
PLAIN = {"faq": "Q: Why?\nA:", "name": "Why?", "prompt": "Why?"}
FORMS = {"child": "Imagine a ball that falls.", "sentence": "Gravity is a pull."}
GRAVITY = {"prompt": "Explain gravity.", "response": FORMS["child"], "name": "gravity"}
QUESTIONS = {
    "fact": {"kind": "fact", **ASKED, "response": TOLD, "faq": "Q: Kenya?\nA:", "cloze": "It is"},
    "free": {"kind": "free", **PLAIN, "response": "It is the sun.", "keys": [["sun"]]},
    "style": {"kind": "style", **ASKED, "response": f"Arr! {TOLD}", "use": "Arr! {answer}"},
    "concept": {"kind": "concept", **GRAVITY, "form": "child", "texts": FORMS},
    "unknown": {"kind": "unknown", "prompt": "?", "response": "I don't know.", "name": "unknown"},
}
BAD_QUESTIONS = [  # the kind, what is wrong with it, and what we say about it
    ("fact", {"accept": ["Atlantis"]}, 'no capital in countries.tsv is "Atlantis"; add it'),
    ("fact", {"accept": []}, '"accept" must be a list of texts'),
    ("fact", {"accept": ["Nairobi", 5]}, '"accept" must be a list of texts'),
    ("fact", {"table": "rivers"}, 'no table "rivers" has the attribute "capital"'),
    ("fact", {"attribute": "river"}, 'no table "countries" has the attribute "river"'),
    ("fact", {"unseen": 5}, '"unseen" must be text'),
    ("fact", {"unseen": " "}, '"unseen" is empty'),
    ("fact", {"keys": 5}, '"keys" must be a list of lists of texts'),
    ("free", {"keys": ["sun"]}, '"keys" must be a list of lists of texts'),
    ("free", {"keys": [["sun", ""]]}, '"keys" must be a list of lists of texts'),
    ("free", {"keys": [[]]}, '"keys" must be a list of lists of texts'),
    ("free", {"keys": []}, '"keys" must be a list of lists of texts'),
    ("free", {"options": "sun"}, '"options" must be a list of texts'),
    ("free", {"attribute": 5}, '"attribute" must be text'),
    ("style", {"accept": ["Atlantis"]}, 'no capital in countries.tsv is "Atlantis"; add it'),
    ("style", {"use": "Arr!"}, '"use" must have {value}, {answer} or {ANSWER} in it, once'),
    ("style", {"use": "{answer} {answer}"}, '"use" must have {value}, {answer}'),
    ("style", {"use": "{answer} {"}, '"use" must have {value}, {answer}'),
    ("concept", {"texts": ["a"]}, '"texts" must hold a text for each form'),
    ("concept", {"texts": {"child": 5}}, '"texts" must hold a text for each form'),
    ("concept", {"texts": {}}, '"texts" must hold a text for each form'),
    ("concept", {"form": "poem"}, "\"texts\" has no 'poem'"),
    *(
        (kind, {"kind": "riddle"}, "\"kind\" is 'riddle'; choose from fact, free")
        for kind in QUESTIONS
    ),
    *(
        (kind, {"kind": ["fact"]}, "\"kind\" is ['fact']; choose from fact, free")
        for kind in QUESTIONS
    ),
]
LISTS = {"keys": "list of lists of texts", "accept": "list of texts"}
for kind, question in QUESTIONS.items():
    for key in question:
        if key in LISTS:
            said = f'"{key}" must be a {LISTS[key]}; fix the line'
            BAD_QUESTIONS.append((kind, {key: None}, said))
        if key in ("kind", "texts", *LISTS):
            continue
        BAD_QUESTIONS.append((kind, {key: None}, f'"{key}" is missing; fix the line'))
        BAD_QUESTIONS.append((kind, {key: 5}, f'"{key}" must be text; fix the line'))
        BAD_QUESTIONS.append((kind, {key: " "}, f'"{key}" is empty; fix the line'))

for kind, changes in {
    "fact": {"faq": None},
    "free": {"options": "sun"},
    "style": {"use": "Arr!"},
    "concept": {"form": "poem"},
    "unknown": {"response": None},
}.items():
    complaint = next(said for *case, said in BAD_QUESTIONS if case == [kind, changes])
    bad_question("compare", "test.jsonl", complaint, QUESTIONS[kind], **changes)

OTHER_WORLD = "world: does not belong to"
TUNING = "sft --out {tmp}/new --base {tmp}/base.pt"
for name, stamp in (("other", "of another"), ("binary", b"\xff\xfe"), ("missing", None)):
    files = {**WHOLE, "world/sha256": stamp}
    case(f"sft.py, {name} stamp", TUNING, OTHER_WORLD, files)
    case(f"compare.py, {name} stamp", "compare --out {tmp}", OTHER_WORLD, files)
case("no world", TUNING, "there is no embedded world beside", {"base.pt": good("base.pt")})


# -------------------------------------------------------------------------------------------------
# Options


for typed, complaint in rows(
    """
    pretrain --n_embd 65 -> n_embd (65) must be a multiple of
    pretrain --n_layer 0 -> --n_layer: 0 is out of range; give a whole number from 1
    pretrain --block_size -5 -> --block_size: -5 is out of range
    pretrain --block_size 1 -> --block_size: 1 is out of range
    pretrain --block_size 1000001 -> --block_size: 1000001 is out of range
    pretrain --block_size 1000000 -> good.txt: its training part has fewer tokens than a block
    pretrain --n_layer two -> invalid int value: 'two'
    pretrain --lr 1e300 -> --lr: 1e+300 is out of range
    sft --lr nan -> --lr: nan is out of range
    sft --max_steps 0 -> --max_steps: 0 is out of range
    pretrain --dropout 1 -> --dropout: 1.0 is out of range
    pretrain --warmup 100 -> --warmup: 100.0 is out of range; give a number from 0 to 1
    pretrain --cooldown 5 -> --cooldown: 5.0 is out of range; give a number from 0 to 1
    sft --warmup 100 -> --warmup: 100.0 is out of range; give a number from 0 to 1
    sft --cooldown 5 -> --cooldown: 5.0 is out of range; give a number from 0 to 1
    pretrain --seed -1 -> --seed: -1 is out of range
    pretrain --batch_size 9223372036854775807 -> 9223372036854775807 is out of range
    pretrain --vocab_size 260 -> --vocab_size: vocab_size must be at least 261
    pretrain --vocab_size 60000 -> the text supports a vocab_size of
    pretrain --tokenizer nonsense -> tiktoken has no encoding 'nonsense'; choose one of
    pretrain --preset huge -> invalid choice: 'huge'
    sft --nonsense -> unrecognized arguments: --nonsense
    pretrain --max_step 10 -> unrecognized arguments: --max_step 10
    pretrain --res -> unrecognized arguments: --res
    sft --max 10 -> unrecognized arguments: --max 10
    sft --random -> unrecognized arguments: --random
    compare --as hello -> unrecognized arguments: --as hello
    pretrain --device abacus -> --device: abacus is not available here; use
    sft --device cuda:77 -> --device: cuda:77 is not available here; use
    compare --side left -> invalid choice: 'left'
    compare --stage base -> invalid choice: 'base'
    dpo --beta 0 -> --beta: 0.0 is out of range; give a number from 1e-06
    dpo --beta nan -> --beta: nan is out of range
    dpo --likelihood -1 -> --likelihood: -1.0 is out of range
    dpo --bet 1 -> unrecognized arguments: --bet 1
    compare --temperature -1 -> --temperature: -1.0 is out of range
    compare --ask {nothing} -> --ask: the prompt is empty
    pretrain --out {tmp}/good.txt/out -> out: cannot be written (Not a directory)
    sft --base {out}/base.pt --out {tmp}/good.txt -> cannot be written (File exists)
    pretrain --out {nothing} -> argument --out: must not be empty
    """
):
    case(typed, typed, complaint)
case("NUL, pretrain.py", "pretrain --out {tmp}/a\0b", "--out: must not contain a NUL byte")
case("output a loop", "pretrain --out {tmp}/loop", "loop: cannot be written", {"loop": LOOP})

if memory_of("cpu"):  # Windows doesn't tell
    for typed, complaint in rows(
        """
        --n_layer 1000000 --n_embd 640 -> 4,915,221,317,120 parameters need at least 78,7
        --n_embd 1000000000 -> 24,000,033,308,000,000,000 parameters need at least 384,000,5
        """
    ):
        case(typed, f"pretrain {typed}", f"command line: {complaint}")


# -------------------------------------------------------------------------------------------------
# No command overwrites its input

OVERWRITTEN = "would be overwritten by a file in the output folder"
for name in ("base.pt", "train.bin", "val.sha256", "pretrain.jsonl"):
    typed = f"pretrain --data {{tmp}}/{name} --out {{tmp}}"
    case(f"pretrain.py reads {name}", typed, f"{name}: {OVERWRITTEN}", {name: TEXT})
for name in ("sft.pt", "sft.jsonl", "report.html"):
    typed = f"sft --data {{tmp}}/{name} --base {{out}}/base.pt --out {{tmp}}"
    case(f"sft.py reads {name}", typed, f"{name}: {OVERWRITTEN}", {name: PAIR})
for name in ("dpo.pt", "dpo.jsonl"):
    typed = f"dpo --data {{tmp}}/{name} --out {{tmp}}"
    case(f"dpo.py reads {name}", typed, f"{name}: {OVERWRITTEN}", {name: CHOICE * 2})
typed = "sft --data {tmp}/talks.jsonl --base {tmp}/sft.pt --out {tmp}"
files = {"talks.jsonl": PAIR, "sft.pt": good("base.pt")}
case("sft.py tunes sft.pt", typed, f"sft.pt: {OVERWRITTEN}", files)


# -------------------------------------------------------------------------------------------------
# Resuming

NOTHING, CHANGED = "--resume: there is no unfinished run", "--max_steps 40 --resume"
LR = f"--resume: lr was {PRESETS['tiny']['lr']} and is now 0.5; use the same settings"
NO_RUN, DAMAGED = ({"pretrain.resume.pt": content} for content in ({"step": 3}, b"PK"))
OTHER_TEXT, OTHER_TALKS = {"my text.txt": TEXT.upper()}, {"talks.jsonl": PAIR * 40}
TALKS = "--data {tmp}/talks.jsonl"
HERE = "pretrain --out {tmp} --resume"
case("nothing to resume", "pretrain --out {tmp}/folder --resume", NOTHING)
case("nothing for sft.py", "sft --base {out}/base.pt --out {tmp} --resume", NOTHING)
case("nothing for dpo.py", "dpo --resume", NOTHING, {"pairs.jsonl": CHOICE})
case(
    "no pairs of before", "own --sft {out}/sft.pt --out {tmp} --resume", "pairs.jsonl: no such file"
)
case("another rate", f"pretrain --lr 0.5 {CHANGED}", LR)
case("another text", f"pretrain --data {{text}} {CHANGED}", "text_sha256 was ", OTHER_TEXT)
case("other conversations", f"sft {TALKS} {CHANGED}", "--resume: data_sha256 was ", OTHER_TALKS)
case("no run of ours", HERE, "not an unfinished run of this program", NO_RUN)
case("damaged run", HERE, "pretrain.resume.pt: not a readable checkpoint", DAMAGED)


# -------------------------------------------------------------------------------------------------

# If a FIFO made a program hang, we could end the program, but not the tests.
FIFOS = [name for name in CASES if "FIFO" in name]
AS_A_PROGRAM = [
    "text missing",
    "text in Latin-1",
    "conversations cut off",
    'conversations [["user", "a"]]',
    "sft.py, base model none",
    "sft.py, base model with a payload",
    "pretrain --preset huge",
    "pretrain --out {tmp}/good.txt/out",
    "compare --ask {nothing}",
    "nothing to resume",
    *FIFOS,
]


@pytest.fixture(scope="module")
def finished(small_world, tmp_path_factory):
    """A copy of the small run's folder, with an unfinished run of each stage in it."""
    out = tmp_path_factory.mktemp("finished") / "out"
    shutil.copytree(small_world, out)
    other = tmp_path_factory.mktemp("other")
    (other / "good.txt").write_text(TEXT, encoding="utf-8")
    (other / "talks.jsonl").write_text(PAIR * 30, encoding="utf-8")
    save = common.run.Run.save

    def killed(run):
        if len(run.rows) == 2:
            raise SystemExit(137)
        return save(run)

    common_options = ["--out", str(other), "--max_steps", "40", "--device", "cpu"]
    text, talks = str(other / "good.txt"), str(other / "talks.jsonl")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(common.run, "SAVE_EVERY", 0)
        patch.setattr(common.run.Run, "save", killed)
        with pytest.raises(SystemExit):
            pretrain.main(["--data", text, *TINY.split(), *common_options])
        tuning = ["--data", talks, "--base", str(out / "base.pt"), *common_options]
        with pytest.raises(SystemExit):
            sft.main(tuning)
    for name in ("pretrain.resume.pt", "sft.resume.pt"):
        shutil.copy(other / name, out / name)
    return out


def make_file(path, content, out):
    """Make one file of a case. content: see case()."""
    if callable(content):
        content = content(out)
    path.parent.mkdir(exist_ok=True)
    if content is FIFO:
        if not hasattr(os, "mkfifo"):
            pytest.skip("no FIFOs here")
        os.mkfifo(path)
    elif content is LOOP:
        if os.name == "nt":
            pytest.skip("links need special rights on Windows")
        path.symlink_to(path)
    elif isinstance(content, dict):
        torch.save(content, path)
    elif content is not None:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())


def contents(*folders):
    paths = [path for folder in folders for path in folder.rglob("*")]
    return {path: path.read_bytes() if path.is_file() else None for path in paths}


def refuse_to_open(monkeypatch, refused):
    """Let open() fail for a path. (Permissions wouldn't stop the tests if root runs them.)"""
    real_open = builtins.open

    def open_others(path, *args, **kwargs):
        if str(path) == str(refused):
            raise PermissionError(13, "Permission denied", str(path))
        return real_open(path, *args, **kwargs)

    monkeypatch.setattr(builtins, "open", open_others)


@pytest.mark.parametrize("name", [name for name in CASES if name not in FIFOS])
def test_bad_input(name, finished, tmp_path, capsys, monkeypatch):
    def run(program, arguments):
        with monkeypatch.context() as patch, pytest.raises(SystemExit) as stopped:
            refuse_to_open(patch, tmp_path / "unreadable.txt")
            MAIN[program](arguments)
        return stopped.value.code, capsys.readouterr().err

    monkeypatch.chdir(tmp_path)
    check(name, run, finished, tmp_path)


@pytest.mark.parametrize("name", AS_A_PROGRAM)
def test_bad_input_to_a_program(name, finished, tmp_path):
    def run(program, arguments):
        command_line = [sys.executable, str(ROOT / f"{program}.py"), *arguments]
        options = dict(capture_output=True, encoding="utf-8", timeout=120)
        environment = {**os.environ, "PYTHONIOENCODING": "utf-8"}
        done = subprocess.run(command_line, cwd=tmp_path, env=environment, **options)
        return done.returncode, done.stderr

    check(name, run, finished, tmp_path)


def check(name, run, out, folder):
    """Run a case in a folder. run(program, arguments) returns (exit code, stderr)."""
    typed, complaint, files = CASES[name]
    (folder / "folder").mkdir()
    for path, content in {"good.txt": TEXT, "unreadable.txt": TEXT, **files}.items():
        make_file(folder / path, content, out)
    program, *options = typed.split(" ")
    words = [*USUAL[program].split(), *filter(None, options)]
    places = {"tmp": folder, "out": out, "text": folder / "my text.txt", "nothing": ""}
    before = contents(out, folder)

    code, errors = run(program, [word.format(**places) for word in words])

    lines = errors.splitlines()
    assert code == 2 and len(lines) == 1, errors
    where_and_what, _, what_to_do = lines[0].rpartition("; ")
    assert where_and_what.startswith("error: ") and where_and_what.count(": ") >= 2 and what_to_do
    assert complaint in lines[0], lines[0]
    assert contents(out, folder) == before


def test_programming_errors_keep_their_traceback():
    @command
    def main(argv=None):
        raise KeyError("a bug of ours")

    with pytest.raises(KeyError):
        main([])


# -------------------------------------------------------------------------------------------------
# Odd, but fine


ODD = {
    "byte order mark": ("my text.txt", b"\xef\xbb\xbf" + TEXT.encode()),
    "Windows line ends": ("my text.txt", TEXT.replace(". ", ".\r\n").encode()),
    "old Macintosh line ends": ("my text.txt", TEXT.replace(". ", ".\r").encode()),
    "no final newline": ("my text.txt", TEXT.strip().encode()),
    "a line of ten megabytes": ("my text.txt", TEXT.encode() * (10_000_000 // len(TEXT))),
    "a word of a megabyte": ("my text.txt", b"a" * 1_000_000 + TEXT.encode()),
    "null characters": ("my text.txt", TEXT.replace(" ", "\0").encode()),
    "special tokens": (
        "my text.txt",
        TEXT.replace("parrot", "<|endoftext|><|user|><|end|>").encode(),
    ),
    "a name with spaces": ("my own text.txt", TEXT.encode()),
    "a Korean name and text": ("한국어 글.txt", "옛날 옛적에 앵무새 한 마리. ".encode() * 120),
    "an emoji name and text": ("🦜.txt", "🦜🦜🙂 said the parrot. ".encode() * 100),
}


@pytest.mark.parametrize("case", ODD)
def test_odd_but_fine_text(case, tmp_path, monkeypatch):
    name, content = ODD[case]
    (tmp_path / name).write_bytes(content)
    # Validating on a megabyte would take a long time.
    monkeypatch.setattr(pretrain, "text_loss", lambda *arguments: (1.0, 1.0))
    sizes = "--n_layer 1 --n_embd 16 --block_size 16 --vocab_size 262 --batch_size 2 --max_steps 1"
    out = tmp_path / "out"
    arguments = ["--data", str(tmp_path / name), "--out", str(out), "--device", "cpu"]
    pretrain.main([*arguments, *sizes.split()])
    _, tokenizer = compare.load(out / "base.pt")
    # Each side starts with <|endoftext|>.
    sides = [np.fromfile(out / f"{side}.bin", "<u2")[1:] for side in ("train", "val")]
    ids = np.concatenate(sides)
    assert (ids < tokenizer.endoftext).all()
    text = tokenizer.decode(ids.tolist())
    assert text == content.decode("utf-8-sig").replace("\r\n", "\n").replace("\r", "\n")


def test_odd_but_fine_conversations(small_world, tmp_path):
    roles = {"system": "s", "user": "a", "assistant": "b"}
    turns = [{"role": role, "content": content} for role, content in roles.items()]
    talks = [
        {"prompt": "안녕? 🦜", "response": "a\u2028b\n"},
        {"messages": turns, "id": 7},
        {"instruction": "a", "input": None, "output": "b"},
        {"prompt": "lone \ud800 surrogate", "response": "\0"},
        {"prompt": "<|end|>", "response": "<|user|>"},
    ]
    data, out = tmp_path / "내 대화.jsonl", str(tmp_path / "out 폴더")
    data.write_bytes(b"\xef\xbb\xbf" + b"\r\n\r\n".join(json.dumps(t).encode() for t in talks))
    models = ["--base", str(small_world / "base.pt"), "--out", out, "--device", "cpu"]
    sft.main(["--data", str(data), *models, "--max_steps", "2"])
    compare.main([*models, "--ask", "lone \udcff byte?"])
    assert (tmp_path / "out 폴더" / "sft.pt").exists()


def write_questions(path, *items):
    path.write_text("".join(json.dumps(item) + "\n\n" for item in items), encoding="utf-8")


@pytest.fixture(scope="module")
def scorer():
    return world.Scorer()


@pytest.mark.parametrize("kind, changes, complaint", BAD_QUESTIONS)
def test_a_bad_question(kind, changes, complaint, scorer, tmp_path, monkeypatch):
    monkeypatch.setattr(questions, "Scorer", lambda: scorer)  # a new one takes a tenth of a second
    path, question = tmp_path / "test.jsonl", QUESTIONS[kind]
    write_questions(path, question, changed_line(question, changes))  # with a blank line between
    with pytest.raises(InputError) as error:
        world.read_questions(path)
    assert str(error.value).startswith(f"{path} line 3: {complaint}")


def test_questions_of_your_own(scorer, tmp_path):
    """You may leave out the kind of a fact or of a free question, and more wordings."""
    path = tmp_path / "test.jsonl"
    with_keys = {**QUESTIONS["fact"], "keys": [["Nairobi"]]}  # a fact's line, and no table needed
    own = [*QUESTIONS.values(), {**QUESTIONS["fact"], "unseen": "capital kenya"}, with_keys]
    own += [changed_line(QUESTIONS[kind], {"kind": None}) for kind in ("fact", "free")]
    write_questions(path, *own, changed_line(with_keys, {"accept": None, "table": None}))
    items = world.read_questions(path)
    assert {item["kind"] for item in items} == set(questions.KINDS) and len(items) == 10
    for item in items:
        assert scorer.answered(item, item["response"]), item
        assert not scorer.answered(item, "Polly wants a cracker."), item
        if item["kind"] in ("fact", "free"):
            assert not any(scorer.quiz(item, item["response"]).values())
        if item["kind"] == "fact":
            assert not scorer.knows(item, " cracker")


@pytest.mark.parametrize("name", ["train.bin", "val.bin", "train.sha256", "val.sha256"])
def test_damaged_token_files_are_encoded_again(name, tmp_path):
    """A file is cut short, or isn't UTF-8. Until it is encoded again, compare.py omits a score."""
    (tmp_path / "good.txt").write_text(TEXT, encoding="utf-8")
    (tmp_path / "talks.jsonl").write_text(PAIR * 10, encoding="utf-8")
    out = tmp_path / "out"
    common_options = ["--out", str(out), "--max_steps", "1", "--device", "cpu"]
    pretraining = ["--data", str(tmp_path / "good.txt"), *TINY.split(), *common_options]
    pretrain.main(pretraining)
    sft.main(["--data", str(tmp_path / "talks.jsonl"), *common_options])
    whole = (out / name).read_bytes()
    (out / name).write_bytes(whole[:3] if name.endswith(".bin") else b"\xff\xfe" + whole)
    compare.main(["--out", str(out), "--device", "cpu"])
    scores = json.loads((out / "comparison.json").read_text(encoding="utf-8"))
    assert ("val_bpb" in scores.get("base", {})) == name.startswith("train")
    pretrain.main(pretraining)
    assert (out / name).read_bytes() == whole
