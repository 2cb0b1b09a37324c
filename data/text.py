"""
Plain text as rows of token ids.

We read the files piece by piece and encode them once, into a file of small integers on the disk.
Pretraining learns from rows of that file. We never hold a whole text in memory, so it can be larger
than your memory.
"""

import hashlib
import itertools
import math
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch

from common.files import check_file, find_files, read_pieces, sha256_of, writing
from common.messages import InputError, Progress


class Rows:
    """Tokens cut into rows of block_size.

    Neighboring rows share one token: the last of a row is also the first of the next. A row can't
    predict its own first token, so the row before predicts it. Each token of the text is predicted
    exactly once, except for the very first token and leftovers that don't fill a row.
    """

    def __init__(self, tokens, block_size):
        """tokens: (n,) integers. block_size: at least 2. Raises ValueError if n < block_size."""
        if len(tokens) < block_size:
            raise ValueError(f"{len(tokens)} tokens don't fill a row of {block_size}")
        self.tokens, self.block_size = tokens, block_size

    def __len__(self):
        return (len(self.tokens) - 1) // (self.block_size - 1)

    def take(self, indices):
        """The rows with these numbers, (B, T) int64."""
        starts = np.asarray(indices) * (self.block_size - 1)  # (B,)
        positions = starts[:, None] + np.arange(self.block_size)  # (B, T)
        return torch.from_numpy(self.tokens[positions].astype(np.int64))


# Text files


def survey(paths):
    """Read all files once. Returns (files, sha256), files as [(path, number of characters)].

    sha256 is a hash of everything in them. Skips blank files. Raises
    InputError if a file is missing, unreadable or not UTF-8, or if there is no text at all.
    """
    files, found, digest, done = [], find_files(paths), hashlib.sha256(), 0
    megabytes = sum(path.stat().st_size for path in found) // 10**6
    progress = Progress("reading, MB:", megabytes, unit="MB")

    def look(raw):
        nonlocal done
        done += len(raw)
        digest.update(raw)
        progress.update(done // 10**6)

    for path in found:
        n, blank = 0, True
        for piece in read_pieces(path, look):
            n, blank = n + len(piece), blank and not piece.strip()
        digest.update(b"%d" % n)  # the hash depends on where each file ends
        if not blank:
            files.append((path, n))
    if not files:
        raise InputError(found[0], "no text in it", "give a file with some text")
    return files, digest.hexdigest()


class Text:
    """The characters from start to end, as if the files were one long string.

    Iterate over a Text to get documents, and over a document to get its pieces, which are strings.
    It reads the disk as you go.
    """

    def __init__(self, files, start, end):
        """files: [(path, number of characters)]"""
        self.files, self.start, self.end = files, start, end

    def __iter__(self):
        before = 0  # characters in earlier files
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


def fills_a_row(documents, n_characters, tokenizer, block_size):
    """Whether the documents make at least block_size tokens. n_characters: how long they are."""
    longest = max(map(len, tokenizer.merges))
    if n_characters >= block_size * longest:
        return True  # no need to encode a long text to find out
    n = sum(1 + sum(len(tokenizer.encode(p)) for p in document) for document in documents)
    return n >= block_size


# Files of tokens: integers of 2 or 4 bytes. Beside each file, a stamp says what it was made from.


def write_tokens(documents, tokenizer, path, fingerprint, n_characters):
    """Encode documents into a file, with <|endoftext|> before each one. Uses all processors.

    documents: each an iterable of strings, its pieces. n_characters: their total length.
    fingerprint: identifies the documents and the tokenizer. If it still matches, we keep the file.
    """
    if has_tokens(path, fingerprint):
        return

    def pieces():
        for document in documents:
            yield None  # a document starts
            yield from document

    def encode(piece):
        ids = [tokenizer.endoftext] if piece is None else tokenizer.encode_to_array(piece)
        return np.asarray(ids).astype(dtype_of(tokenizer)).tobytes()

    left, done = pieces(), 0
    millions = n_characters // 10**6
    progress = Progress("encoding, million characters:", millions, unit="million")
    with writing(path) as file, ThreadPoolExecutor() as pool:
        while some := list(itertools.islice(left, 32)):
            for ids in pool.map(encode, some):
                file.write(ids)
            done += sum(len(piece or "") for piece in some)
            progress.update(done // 10**6)
        stamp_of(path).unlink(missing_ok=True)  # it belongs to the file we are about to replace
    with writing(stamp_of(path), "w") as file:
        file.write(stamp(path, fingerprint))


def stamp_of(path):
    return path.with_suffix(".sha256")


def stamp(path, fingerprint):
    """What belongs into the stamp of a token file: a changed byte changes it."""
    return f"{fingerprint} {path.stat().st_size} {sha256_of(path)}"


def read_stamp(path):
    """What the stamp of a token file says: fingerprint, size in bytes and hash, or ""."""
    try:
        check_file(stamp_of(path))
        return stamp_of(path).read_text(encoding="utf-8")
    except (InputError, OSError, UnicodeDecodeError):  # missing, or edited
        return ""


def has_tokens(path, fingerprint):
    """Whether path is a file of tokens with this fingerprint, and undamaged. Reads all of it."""
    return path.is_file() and read_stamp(path) == stamp(path, fingerprint)


def dtype_of(tokenizer):
    return np.dtype("<u2" if tokenizer.n_vocab <= 65536 else "<u4")


class TokenFile(np.memmap):
    """An array of token ids on the disk. Ids are read and checked when you take them."""

    n_vocab = math.inf

    def __getitem__(self, index):
        ids = np.asarray(super().__getitem__(index))
        if ids.size and ids.max() >= self.n_vocab:
            raise damaged(self.filename)
        return ids


def open_tokens(path, tokenizer):
    """The tokens of a file that write_tokens() made, as an array (n,). This reads none of them yet.

    Raises InputError if the size is wrong. A wrong id raises InputError later, when you take it.
    """
    size, dtype = path.stat().st_size, dtype_of(tokenizer)
    complete = f" {size} " in read_stamp(path)
    if not complete or size == 0 or size % dtype.itemsize:
        raise damaged(path)
    tokens = TokenFile(path, dtype=dtype, mode="r")
    tokens.n_vocab = tokenizer.n_vocab
    return tokens


def damaged(path):
    todo = f"delete it, and run python pretrain.py --out {path.parent} again"
    return InputError(path, "is damaged", todo)
