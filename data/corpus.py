"""
What a base model reads (your own files, or the embedded world), and the model's tokenizer.
"""

import hashlib
import itertools
import json
import secrets
from dataclasses import dataclass
from pathlib import Path

import tiktoken

from common.messages import InputError
from data import world
from data.text import Text, fills_a_row, survey, write_tokens
from data.tokenizer import Tokenizer

MOST_VALIDATION = 1_000_000  # characters: the last tenth of a text, but no more than this


@dataclass
class Corpus:
    """Text to train on and text to validate on."""

    name: str  # for messages
    sides: dict  # "train" and "val" -> (documents, number of characters); a document yields strings
    sha256: str  # of all the text
    files: list  # of paths that were read
    world: dict | None  # the embedded world
    trained_on: dict  # a note for the checkpoint
    place: tuple = ()  # the world's folder and fingerprint

    def fingerprint(self, tokenizer):
        """A hash of the text and the tokenizer. If it is the same, so are all token ids."""
        return hashlib.sha256(f"{self.sha256} {tokenizer.state()}".encode()).hexdigest()

    def check_length(self, tokenizer, block_size):
        """Raise InputError unless each side fills a block."""
        for side, (documents, n_characters) in self.sides.items():
            if not fills_a_row(documents, n_characters, tokenizer, block_size):
                part = {"train": "training", "val": "validation"}[side]
                what = f"its {part} part has fewer tokens than a block of {block_size}"
                raise InputError(self.name, what, "give more text or a smaller --block_size")

    def write(self, tokenizer, out):
        """Encode it to out/train.bin and out/val.bin, unless they are there already.

        Raises InputError if out/world has files that we didn't write, or that changed since.
        """
        fingerprint = self.fingerprint(tokenizer)
        if self.world and not world.is_ours(out / "world", self.world):
            what = "has files that this program did not write, or that were changed since"
            raise InputError(out / "world", what, "move that folder, or choose another --out")
        for side, (documents, n_characters) in self.sides.items():
            write_tokens(documents, tokenizer, out / f"{side}.bin", fingerprint, n_characters)
        self.place = out / "world", fingerprint

    def write_world(self):
        """Write the embedded world, if it is one, once its model is finished."""
        if not self.world:
            return
        folder, fingerprint = self.place
        if not world.is_ours(folder, self.world):  # it was changed during the training
            kept = folder.with_name(f"{folder.name}.{secrets.token_hex(4)}")
            print(f"\n{folder} was changed while this ran. We keep it as {kept}.")
            folder.rename(kept)
        world.write(self.world, folder, fingerprint)


def read_corpus(paths, seed):
    """Read text files and folders. Without paths, build the embedded world of this seed."""
    if not paths:
        made = world.build(seed)
        sha256 = hashlib.sha256(json.dumps([made["corpus"], made["val"]]).encode()).hexdigest()
        sides = {}
        for side, texts in (("train", made["corpus"]), ("val", made["val"])):
            sides[side] = [[text] for text in texts], sum(map(len, texts))
        return Corpus("the embedded world", sides, sha256, [], made, {"world": seed})
    files, sha256 = survey(paths)
    n = sum(characters for _, characters in files)
    cut = max(n * 9 // 10, n - MOST_VALIDATION)
    sides = {"train": (Text(files, 0, cut), cut), "val": (Text(files, cut, n), n - cut)}
    read = [Path(path) for path, _ in files]
    return Corpus(", ".join(paths), sides, sha256, read, None, {"files": list(paths)})


def make_tokenizer(corpus, vocab_size, name=""):
    """Learn a tokenizer from the corpus, or take tiktoken's encoding of this name.

    Raises InputError if the text is too short or the encoding isn't available.
    """
    if not name:
        documents, _ = corpus.sides["train"]
        try:
            return Tokenizer.train(itertools.chain.from_iterable(documents), vocab_size)
        except ValueError as error:
            todo = "choose another size, or give more text"
            raise InputError("--vocab_size", str(error), todo) from None
    names = tiktoken.list_encoding_names()
    if name not in names:
        what = f"tiktoken has no encoding {name!r}"
        raise InputError("--tokenizer", what, f"choose one of {', '.join(names)}")
    try:
        return Tokenizer.named(name)
    except (OSError, ValueError) as error:  # offline, or a damaged download
        what = f"{name} cannot be downloaded ({type(error).__name__})"
        todo = "go online for its first use, or set TIKTOKEN_CACHE_DIR to the folder that has it"
        raise InputError("--tokenizer", what, todo) from None
