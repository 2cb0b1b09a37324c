"""Files: what we refuse to read, what we never overwrite, and damaged token files."""

import errno
import json
import os
import secrets
import socket
import subprocess
import sys

import numpy as np
import pytest

from common.files import (
    check_file,
    find_files,
    lock,
    read_json,
    read_log,
    refuse_overwriting,
    remove_leftovers,
    unlock,
    writing,
)
from common.messages import InputError
from conftest import ROOT
from data import Tokenizer
from data.text import Rows, has_tokens, open_tokens, survey, write_tokens

needs_links = pytest.mark.skipif(os.name == "nt", reason="links need special rights on Windows")


def make_fifo(path):
    if not hasattr(os, "mkfifo"):
        pytest.skip("no FIFOs here")
    os.mkfifo(path)


def make_socket(path):
    if not hasattr(socket, "AF_UNIX"):
        pytest.skip("no sockets in the file system here")
    with socket.socket(socket.AF_UNIX) as s:
        s.bind(str(path))


def make_loop(path):
    other = path.with_name("other")
    path.symlink_to(other)
    other.symlink_to(path)


ODD_FILES = {
    "missing": (lambda path: None, "no such file or folder"),
    "a broken link": (lambda path: path.symlink_to("nowhere"), "no such file or folder"),
    "a folder": (lambda path: path.mkdir(), r"cannot be read \(Is a directory\)"),
    "a FIFO": (make_fifo, "not a regular file"),
    "a socket": (make_socket, "not a regular file"),
    "a device": (lambda path: path.symlink_to(os.devnull), "not a regular file"),
    "a loop of links": (make_loop, r"cannot be read \("),
}


@needs_links
@pytest.mark.parametrize("case", ODD_FILES)
def test_only_regular_files_are_opened(case, tmp_path):
    make, complaint = ODD_FILES[case]
    path = tmp_path / "odd.txt"
    make(path)
    with pytest.raises(InputError, match=f"odd.txt: {complaint}.*; "):
        check_file(path)
    with pytest.raises(InputError, match=f"odd.txt: {complaint}"):
        read_json(path)
    if case != "a folder":
        with pytest.raises(InputError, match=f"odd.txt: {complaint}"):
            survey([path])


@needs_links
def test_a_link_to_a_file_is_a_file(tmp_path):
    (tmp_path / "real.txt").write_text("text", encoding="utf-8")
    (tmp_path / "link.txt").symlink_to("real.txt")
    check_file(tmp_path / "link.txt")
    assert find_files([tmp_path / "link.txt"]) == [tmp_path / "link.txt"]


@pytest.mark.parametrize("name", ["a\0b", "x" * 300, "no/such"])
def test_a_path_that_cannot_be(name, tmp_path):
    path = tmp_path / name
    for read in (check_file, read_json, lambda path: find_files([path])):
        with pytest.raises(InputError):
            read(path)


def test_what_lies_in_a_folder(tmp_path):
    for name in ("b.txt", "a.MD", "c.bin", "sub.txt"):
        (tmp_path / name).mkdir() if name == "sub.txt" else (tmp_path / name).touch()
    (tmp_path / "sub.txt" / "d.md").touch()
    found = find_files([tmp_path, tmp_path / "b.txt"])
    assert [path.name for path in found] == ["a.MD", "b.txt", "d.md"]


@pytest.mark.parametrize("depth", [60, 500, 1000, 100_000])
@pytest.mark.parametrize("opening, closing", ["[]", ('{"a": [', "]}")])
def test_json_nested_too_deeply(depth, opening, closing, tmp_path):
    deep = opening * depth + "1" + closing * depth
    lines = tmp_path / "lines.jsonl"
    lines.write_text('{"a": 1}\n{"b": ' + deep + "}\n", encoding="utf-8")
    with pytest.raises(InputError, match="lines.jsonl line 2: .*JSON .*deep"):
        read_json(lines)
    array = tmp_path / "array.json"
    array.write_text('[{"a": 1},\n' + deep + "]", encoding="utf-8")
    with pytest.raises(InputError, match="array.json (line|entry) 2: .*JSON .*deep"):
        read_json(array)


def test_json_nested_a_little(tmp_path):
    deep = {"a": [[[{"b": "[" * 100}]]]}
    (tmp_path / "a.jsonl").write_text(json.dumps(deep), encoding="utf-8")
    assert read_json(tmp_path / "a.jsonl") == [(f"{tmp_path / 'a.jsonl'} line 1", deep)]


def test_where_json_is_broken(tmp_path):
    path = tmp_path / "a.json"
    path.write_text("[1,\n\n2,\n}", encoding="utf-8")
    with pytest.raises(InputError, match="a.json line 4: broken JSON"):
        read_json(path)
    path.write_text("1\n" + "9" * 5000, encoding="utf-8")
    with pytest.raises(InputError, match="a.json line 2: broken JSON"):
        read_json(path)
    assert read_log(path) == []


def test_writing_touches_no_other_file(tmp_path):
    """Whatever stands beside it, even a link with the name of a temporary file."""
    mine = [
        tmp_path / name for name in ("base.pt.tmp", "base.pt.0123abcd.tmp.txt", "base.pt.x.tmp")
    ]
    for path in mine:
        path.write_text("mine", encoding="utf-8")
    with writing(tmp_path / "base.pt", "w") as file:
        (aside,) = set(tmp_path.iterdir()) - set(mine)
        with writing(tmp_path / "base.pt", "w") as other:  # as another process might
            other.write("other")
        file.write("new")
    assert (tmp_path / "base.pt").read_text(encoding="utf-8") == "new"
    (tmp_path / aside.name).write_text("left by a killed process", encoding="utf-8")
    remove_leftovers([tmp_path / "base.pt"])
    assert set(tmp_path.iterdir()) == {*mine, tmp_path / "base.pt"}
    assert all(path.read_text(encoding="utf-8") == "mine" for path in mine)


@needs_links
def test_writing_follows_no_link(tmp_path, monkeypatch):
    monkeypatch.setattr(secrets, "token_hex", lambda n: "0123abcd")
    (tmp_path / "mine").write_text("mine", encoding="utf-8")
    (tmp_path / "a.0123abcd.tmp").symlink_to("mine")
    with pytest.raises(InputError, match="File exists"), writing(tmp_path / "a", "w") as file:
        file.write("new")
    assert (tmp_path / "mine").read_text(encoding="utf-8") == "mine"


def test_a_disk_without_locks_can_be_used(tmp_path, monkeypatch):
    def acquire(*_, **__):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr("common.files.FileLock.acquire", acquire)
    lock(tmp_path)
    unlock(tmp_path)


def test_one_process_at_a_time(tmp_path):
    """The lock is free again after unlock(), and when the process that held it has been killed."""
    code = "import sys; from pathlib import Path; from common.files import lock; "
    code += "lock(Path(sys.argv[1])); print('mine', flush=True); input()"

    def start():
        pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        return subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], cwd=ROOT, **pipes)

    other = start()
    assert other.stdout.readline() == "mine\n"
    what = rf"another run writes here \(process {other.pid}\); wait until it ends, or choose"
    with pytest.raises(InputError, match=what):
        lock(tmp_path)
    other.kill()
    other.communicate()
    lock(tmp_path)
    lock(tmp_path)  # twice in one process is fine
    unlock(tmp_path)
    unlock(tmp_path)
    other = start()
    assert other.stdout.readline() == "mine\n"
    other.communicate("\n")


@needs_links
def test_overwriting_through_a_link(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "link").symlink_to("out")
    make_loop(tmp_path / "loop")
    with pytest.raises(InputError, match="would be overwritten"):
        refuse_overwriting([tmp_path / "link" / "base.pt"], [tmp_path / "out" / "base.pt"])
    refuse_overwriting([tmp_path / "loop"], [tmp_path / "out" / "base.pt"])


def test_writing_keeps_the_old_file_until_the_end(tmp_path):
    path = tmp_path / "new folder" / "a.txt"
    with writing(path, "w") as file:
        file.write("old\n")
    with pytest.raises(ZeroDivisionError), writing(path, "w") as file:
        file.write("new")
        raise ZeroDivisionError
    assert path.read_bytes() == b"old\n" and len(list(path.parent.iterdir())) == 1


# Files of tokens


@pytest.fixture
def tokenizer():
    return Tokenizer.train(["the cat sat on the mat"], 265)


@pytest.fixture
def path(tokenizer, tmp_path):
    write_tokens([["the cat", " sat"], ["on"]], tokenizer, tmp_path / "train.bin", "print", 13)
    return tmp_path / "train.bin"


def test_what_a_token_file_belongs_to(path, tokenizer):
    assert has_tokens(path, "print") and not has_tokens(path, "another")
    assert not has_tokens(path.with_name("none.bin"), "print")
    assert open_tokens(path, tokenizer).tolist()[-3:] == [tokenizer.endoftext, *b"on"]


@pytest.mark.parametrize("n", [0, 1, 4, 10])
def test_a_token_file_that_was_cut(n, path, tokenizer):
    whole = path.read_bytes()
    path.write_bytes(whole[:n])
    assert not has_tokens(path, "print")
    with pytest.raises(InputError, match="train.bin: is damaged; delete it, and run"):
        open_tokens(path, tokenizer)
    write_tokens([["the cat", " sat"], ["on"]], tokenizer, path, "print", 13)
    assert path.read_bytes() == whole and has_tokens(path, "print")


@pytest.mark.parametrize(
    "stamp", [b"", b"\xff\xfe", b"print", b"print x", b"print 9" + b"9" * 5000]
)
def test_a_stamp_that_was_edited(stamp, path, tokenizer):
    path.with_name("train.sha256").write_bytes(stamp)
    assert not has_tokens(path, "print")
    with pytest.raises(InputError, match="is damaged"):
        open_tokens(path, tokenizer)
    write_tokens([["the cat", " sat"], ["on"]], tokenizer, path, "print", 13)
    assert has_tokens(path, "print")


def test_a_token_file_with_one_changed_byte(path, tokenizer):
    whole = path.read_bytes()
    path.write_bytes(whole[:2] + bytes([whole[2] ^ 1]) + whole[3:])
    assert not has_tokens(path, "print")  # so it is encoded again before the first step
    write_tokens([["the cat", " sat"], ["on"]], tokenizer, path, "print", 13)
    assert path.read_bytes() == whole


def test_an_id_beyond_the_vocabulary(path, tokenizer):
    ids = np.fromfile(path, "<u2")
    ids[-1] = tokenizer.n_vocab
    ids.tofile(path)
    rows = Rows(open_tokens(path, tokenizer), 4)
    assert rows.take([0, 1]).shape == (2, 4)
    with pytest.raises(InputError, match="train.bin: is damaged"):
        rows.take([0, len(rows) - 1])


def test_opening_tokens_does_not_read_them(path, tokenizer, monkeypatch):
    def scan(*arguments, **options):
        raise AssertionError("scans the whole file")

    monkeypatch.setattr(np.memmap, "max", scan, raising=False)
    assert len(open_tokens(path, tokenizer)) == len(np.fromfile(path, "<u2"))


def test_neighboring_rows_share_one_token():
    rows = Rows(np.arange(11), 5)
    assert len(rows) == 2  # 9 and 10 don't fill a row
    assert rows.take([1, 0]).tolist() == [[4, 5, 6, 7, 8], [0, 1, 2, 3, 4]]
