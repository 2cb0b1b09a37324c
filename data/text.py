"""
Plain text as rows of token ids: files are read piece by piece, encoded once into a file of small integers, and cut into
rows. No plain text is ever held whole, so it may be larger than memory.
"""

import codecs
import hashlib
import io
import itertools
import json
import math
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch

from data.terminal import InputError, Progress, writing

IGNORE_INDEX = -100  # model.py's: data/ imports nothing from outside itself
PIECE = 2**20  # bytes of a file that are read at a time


def find_files(paths):
    """The files that paths name: themselves, and all .txt and .md files in folders, in order. Raises InputError if there is none."""
    files = []
    for path in map(Path, paths):
        try:
            if path.is_dir():
                found = sorted(p for p in path.rglob("*") if p.suffix.lower() in (".txt", ".md") and p.is_file())
                if not found:
                    raise InputError(path, "the folder holds no .txt or .md file", "name the files themselves")
                files += found
            elif path.is_file():
                files.append(path)
            else:
                raise InputError(path, "neither a file nor a folder" if path.exists() else "no such file or folder", "check the path")
        except OSError as error:
            raise InputError(path, f"cannot be read ({error.strerror})", "check the path and its permissions") from None
    return list(dict.fromkeys(files))


def read_pieces(path, look=lambda raw: None):
    """The text of a UTF-8 file, in pieces, strings of at most PIECE characters; a byte order mark and \\r\\n are not text.

    look is shown the bytes of each piece. Raises InputError for a file that cannot be read or is not UTF-8.
    """
    decoder = io.IncrementalNewlineDecoder(codecs.getincrementaldecoder("utf-8-sig")(), translate=True)
    n = 0  # bytes so far
    try:
        with open(path, "rb") as file:
            while True:
                raw = file.read(PIECE)
                n += len(raw)
                look(raw)
                yield decoder.decode(raw, final=not raw)
                if not raw:
                    return
    except UnicodeDecodeError as error:
        raise InputError(path, f"not UTF-8 text (byte {n - len(error.object) + error.start})", "save it as UTF-8") from None
    except OSError as error:
        raise InputError(path, f"cannot be read ({error.strerror})", "check the path and its permissions") from None


def survey(paths):
    """Go through all files once. Returns (files, sha256): [(path, its number of characters)], and the hash of their contents.

    Files with nothing but white space are passed over. Raises InputError for what is missing, unreadable or not UTF-8, and
    where no text is left.
    """
    files, found, digest, done = [], find_files(paths), hashlib.sha256(), 0
    progress = Progress("reading, MB:", sum(path.stat().st_size for path in found) // 10**6, unit="MB")

    def look(raw):
        nonlocal done
        done += len(raw)
        digest.update(raw)
        progress.update(done // 10**6)

    for path in found:
        n, blank = 0, True
        for piece in read_pieces(path, look):
            n, blank = n + len(piece), blank and not piece.strip()
        digest.update(b"%d" % n)  # so that it matters where a file ends
        if not blank:
            files.append((path, n))
    if not files:
        raise InputError(found[0], "no text in it", "give a file with some text")
    return files, digest.hexdigest()


def read_json(path):
    """The entries of a JSON Lines file or a JSON array: [(where, entry)], where naming file and line or entry.

    Raises InputError for a file that cannot be read, is no JSON, or holds nothing.
    """
    path, text = Path(path), "".join(read_pieces(path))
    if text.lstrip().startswith("["):
        try:
            entries = [(f"{path} entry {i}", entry) for i, entry in enumerate(json.loads(text), start=1)]
        except (ValueError, RecursionError) as error:
            where = f"{path} line {error.lineno}" if isinstance(error, json.JSONDecodeError) else path
            raise InputError(where, f"broken JSON ({getattr(error, 'msg', error)})", "mend the array") from None
    else:
        entries = []
        for number, line in enumerate(text.split("\n"), start=1):
            if line.strip():
                try:
                    entries.append((f"{path} line {number}", json.loads(line)))
                except (ValueError, RecursionError) as error:
                    raise InputError(f"{path} line {number}", f"broken JSON ({getattr(error, 'msg', error)})", "put one object on each line") from None
    if not entries:
        raise InputError(path, "the file holds nothing", "give at least one entry")
    return entries


def read_log(path):
    """The rows that a stage logged; [] if there are none that can be read, or they are of a run that has not finished."""
    try:
        return [] if path.with_suffix(".resume.pt").exists() else [row for _, row in read_json(path)]
    except InputError:
        return []


class Text:
    """What stands from character start to character end of some files, taken together: documents, each an iterator of strings.

    It is read from the disk, piece by piece, whenever one goes through it.
    """

    def __init__(self, files, start, end):
        """files: [(path, its number of characters)]"""
        self.files, self.start, self.end = files, start, end

    def __iter__(self):
        before = 0  # characters in the files before this one
        for path, n in self.files:
            if before < self.end and before + n > self.start:
                yield self.part(path, self.start - before, self.end - before)
            before += n

    @staticmethod
    def part(path, start, end):
        for piece in read_pieces(path):
            if end <= 0:
                return
            yield piece[max(0, start) : end]
            start, end = start - len(piece), end - len(piece)


def write_tokens(documents, tokenizer, path, fingerprint, n_characters):
    """Encode documents, each after <|endoftext|>, into a file of uint16 (uint32 for a large vocabulary), on all processors.

    documents: each an iterable of strings, its pieces; of n_characters in all. fingerprint: a str that stands for the
    documents and the tokenizer; a file that is already there and has the same is used again.
    """
    stamp = path.with_suffix(".sha256")
    if path.exists() and stamp.exists() and stamp.read_text(encoding="utf-8") == fingerprint:
        return
    pieces = itertools.chain.from_iterable(itertools.chain([None], document) for document in documents)  # None: a new one
    progress, done = Progress("encoding, million characters:", n_characters // 10**6, unit="million"), 0
    with writing(path) as file, ThreadPoolExecutor() as pool:
        while some := list(itertools.islice(pieces, 32)):
            for ids in pool.map(lambda piece: [tokenizer.endoftext] if piece is None else tokenizer.encode_to_array(piece), some):
                file.write(np.asarray(ids).astype(dtype_of(tokenizer)).tobytes())
            done += sum(len(piece or "") for piece in some)
            progress.update(done // 10**6)
        stamp.unlink(missing_ok=True)  # what it stands for is about to go
    with writing(stamp, "w") as file:
        file.write(fingerprint)


def fills_a_row(documents, n_characters, tokenizer, block_size):
    """Whether the documents, of n_characters in all, come to at least block_size tokens. Only a short text is encoded to know it."""
    if n_characters >= block_size * max(map(len, tokenizer.merges)):
        return True
    return sum(1 + sum(len(tokenizer.encode(piece)) for piece in document) for document in documents) >= block_size


def dtype_of(tokenizer):
    return np.dtype("<u2" if tokenizer.n_vocab <= 65536 else "<u4")


def open_tokens(path, tokenizer):
    """The tokens of such a file, (n,), read from the disk as they are needed. Raises InputError if it holds anything else."""
    dtype, size = dtype_of(tokenizer), path.stat().st_size
    tokens = np.memmap(path, dtype=dtype, mode="r") if size and size % dtype.itemsize == 0 else np.array([])
    if len(tokens) == 0 or tokens.max() >= tokenizer.n_vocab:
        raise InputError(path, "is damaged", "delete it, and run python pretrain.py again")
    return tokens


class Rows:
    """Tokens cut into rows of block_size. Neighbours overlap by one token, so that each token but the first is scored once.

    The last row is moved back to be a full one, and what the row before it scores is masked in it.
    """

    def __init__(self, tokens, block_size):
        """tokens: (n,) integers; block_size: at least 2. Raises ValueError if they do not fill a row."""
        if len(tokens) < block_size:
            raise ValueError(f"{len(tokens)} tokens are fewer than the {block_size} of a row")
        self.tokens, self.block_size = tokens, block_size

    def __len__(self):
        return math.ceil((len(self.tokens) - 1) / (self.block_size - 1))

    def batch(self, indices):
        """The rows of these numbers, each from 0 to len(self) - 1. Returns {"input_ids": (B, T) int64, "labels": (B, T) int64}."""
        wanted = np.asarray(indices) * (self.block_size - 1)
        starts = np.minimum(wanted, len(self.tokens) - self.block_size)
        input_ids = torch.from_numpy(self.tokens[starts[:, None] + np.arange(self.block_size)].astype(np.int64))
        labels = input_ids.clone()
        scored_before = torch.from_numpy(wanted - starts)[:, None]  # 0 but for the last row
        labels[(torch.arange(self.block_size) <= scored_before) & (scored_before > 0)] = IGNORE_INDEX
        return {"input_ids": input_ids, "labels": labels}
