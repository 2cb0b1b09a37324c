"""
Plain text as rows of token ids: files are read, encoded once into a file of small integers, and cut into rows.
"""

import hashlib
import math
import os
from pathlib import Path

import numpy as np
import torch

IGNORE_INDEX = -100


class InputError(Exception):
    """Something is wrong with what the user gave: shown as one line, "WHERE: WHAT; WHAT TO DO", without a traceback."""

    def __init__(self, where, what, what_to_do):
        super().__init__(f"{where}: {what}; {what_to_do}")


def read_files(paths):
    """The text of UTF-8 files, and of all .txt and .md files in folders. Returns [(path, text)], in the order given.

    Files with nothing but white space are passed over. Raises InputError for what is missing or not UTF-8, and where
    no text is left.
    """
    files = []
    for path in map(Path, paths):
        if path.is_dir():
            found = sorted(p for p in path.rglob("*") if p.suffix.lower() in (".txt", ".md") and p.is_file())
            if not found:
                raise InputError(path, "the folder holds no .txt or .md file", "name the files themselves")
            files += found
        elif path.exists():
            files.append(path)
        else:
            raise InputError(path, "no such file or folder", "check the path")
    texts = []
    for path in dict.fromkeys(files):
        try:
            text = path.read_text(encoding="utf-8-sig")  # "-sig": a byte order mark is not text
        except UnicodeDecodeError as error:
            raise InputError(path, f"not UTF-8 text (byte {error.start})", "save it as UTF-8") from None
        except OSError as error:
            raise InputError(path, f"cannot be read ({error.strerror})", "check its permissions") from None
        if text.strip():
            texts.append((path, text))
    if not texts:
        raise InputError(files[0], "no text in it", "give a file with some text")
    return texts


def write_tokens(documents, tokenizer, path):
    """Encode documents, each after <|endoftext|>, into a file of uint16 (uint32 for a large vocabulary).

    A file that is already there and was made of the same documents by the same tokenizer is used again.
    """
    fingerprint = hashlib.sha256(repr(tokenizer.state()).encode())
    for document in documents:
        fingerprint.update(document.encode() + b"\0")
    stamp = path.with_suffix(".sha256")
    if not (path.exists() and stamp.exists() and stamp.read_text(encoding="utf-8") == fingerprint.hexdigest()):
        path.parent.mkdir(parents=True, exist_ok=True)
        stamp.unlink(missing_ok=True)
        aside = path.with_name(path.name + ".tmp")
        with open(aside, "wb") as file:
            for document in documents:
                np.array([tokenizer.endoftext, *tokenizer.encode(document)], dtype=dtype_of(tokenizer)).tofile(file)
        os.replace(aside, path)
        stamp.write_text(fingerprint.hexdigest(), encoding="utf-8")


def fills_a_row(documents, tokenizer, block_size):
    """Whether the documents come to at least block_size tokens; encodes no more of them than it takes to know."""
    n = 0
    for document in documents:
        n += 1  # its <|endoftext|>
        for start in range(0, len(document), 10_000):
            n += len(tokenizer.encode(document[start : start + 10_000]))
            if n >= 2 * block_size:  # twice, as a cut can part a token
                return True
    return n >= block_size


def dtype_of(tokenizer):
    return np.dtype("<u2" if tokenizer.n_vocab <= 65536 else "<u4")


def open_tokens(path, tokenizer):
    """The tokens of such a file, (n,), read from the disk as they are needed."""
    return np.memmap(path, dtype=dtype_of(tokenizer), mode="r")


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
