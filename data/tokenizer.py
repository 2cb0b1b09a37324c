"""
Text to token ids and back: byte-pair encoding, learned here, run by tiktoken.

Every text is a string of bytes, so 256 tokens are enough to write anything. Byte-pair encoding
(Sennrich et al. 2016, arXiv 1508.07909; on bytes, Radford et al. 2019) makes texts shorter. It
finds the two neighboring tokens that occur together most often, makes them one new token, and
repeats until the vocabulary is full.

    tokenizer = Tokenizer.train(["some text", "more text"], vocab_size=1024)
    tokenizer.decode(tokenizer.encode("any text at all"))

Five more ids follow the learned ones. They mark where documents and turns begin and end. No text
produces them: encode("<|end|>") gives several ordinary tokens.
"""

import heapq
import re
from collections import Counter, defaultdict
from itertools import pairwise

import numpy as np
import regex  # comes with tiktoken; knows the letters and digits of every script
import tiktoken

from common.messages import Progress

SPECIAL = ("<|endoftext|>", "<|user|>", "<|assistant|>", "<|end|>", "<|pad|>")
MIN_VOCAB = 256 + len(SPECIAL)

# GPT-2's rule for cutting text into words; no token crosses from one word to the next. A word
# includes the space before it. The "?" after a word is a piece of its own. We add our two marks.
PATTERN = r"[\x0e\x0f]|'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"

# "Kenya", "kenya" and "KENYA" are one word to us, so they should be one token to the model. Like a
# typewriter, we write a mark and small letters. No text is lost: a mark in it gets a SHIFT, too.
SHIFT, CAPS_LOCK = "\x0e", "\x0f"  # before a capital letter; before a word in capitals
CAPITALS = re.compile(r"( ?[A-Z]{2,}(?![A-Za-z]))| ?[A-Z]|[\x0e\x0f]")
MARKED = re.compile(rb"\x0e( ?[a-z]|[\x0e\x0f])?|\x0f( ?[a-z]+)?")  # a mark may lack its letter

LONGEST_RUN = 4096  # characters without white space; tiktoken is slow on longer words
BORDER = re.compile(r"\s\S|\S\s")
SAMPLE = 8_000_000  # characters to learn merges from; more text changes few merges
PARTS = PATTERN.replace("+", "{1,32}")  # to learn from; without spaces, a text is one long word
MOST_WORDS = 50_000  # different ones, the most frequent; with more, learning takes longer


def learn_merges(texts, n_merges):
    """Learn up to n_merges tokens of two or more bytes, in the order byte-pair encoding finds them.

    texts: strings. Returns a list of bytes, shorter if the text runs out of pairs to merge.
    """
    words = Counter()
    for text in texts:
        words.update(regex.findall(PARTS, text))
    words = dict(words.most_common(MOST_WORDS))
    counts, progress = list(words.values()), Progress("learning merges", n_merges)
    words = [list(word.encode("utf-8")) for word in words]  # token ids: single bytes at first

    pair_count = Counter()  # (left, right) -> how often these neighbors occur in the text
    found_in = defaultdict(set)  # (left, right) -> the words that hold this pair, or once did
    for i, word in enumerate(words):
        for pair in pairwise(word):
            pair_count[pair] += counts[i]
            found_in[pair].add(i)
    # The most frequent pair comes first. Searching all pairs each time would take 7 times as long.
    heap = [(-n, pair) for pair, n in pair_count.items()]
    heapq.heapify(heap)

    tokens = [bytes([b]) for b in range(256)]
    id_of = {token: i for i, token in enumerate(tokens)}
    while len(tokens) < 256 + n_merges and heap:
        n, pair = heapq.heappop(heap)
        if -n != pair_count[pair]:
            continue  # a stale entry: the pair was pushed again when its count changed
        joined = tokens[pair[0]] + tokens[pair[1]]
        if joined not in id_of:  # "a" + "bc" and "ab" + "c" are the same token
            id_of[joined] = len(tokens)
            tokens.append(joined)
        changed = set()
        for i in found_in.pop(pair):
            old, words[i] = words[i], merge(words[i], pair, id_of[joined])
            changed.update(pairwise(old), pairwise(words[i]))
            for p in pairwise(old):
                pair_count[p] -= counts[i]
            for p in pairwise(words[i]):
                pair_count[p] += counts[i]
                found_in[p].add(i)
        for p in changed:
            if pair_count[p] > 0:
                heapq.heappush(heap, (-pair_count[p], p))
        progress.update(len(tokens) - 256)
    return tokens[256:]


def merge(word, pair, new):
    """Replace every occurrence of the pair in the word, a list of ids, by the id `new`."""
    out, i = [], 0
    while i < len(word):
        found = tuple(word[i : i + 2]) == pair
        out.append(new if found else word[i])
        i += 2 if found else 1
    return out


def mark_capitals(text):
    """ " Kenya" becomes SHIFT + " kenya", and " USA" becomes CAPS_LOCK + " usa"."""
    return CAPITALS.sub(lambda m: (CAPS_LOCK if m[1] else SHIFT) + m[0].lower(), text)


def unmark_capitals(text):
    """Undo mark_capitals(). text: bytes, as tokens may end inside a character."""
    return MARKED.sub(lambda m: (m[1] or m[2] or b"").upper(), text)


class Tokenizer:
    """A thin layer over tiktoken.Encoding, with five special ids after the ordinary ones."""

    def __init__(self, merges, pattern=PATTERN):
        """merges: tokens as bytes, in order of rank, with all 256 single bytes among them."""
        self.merges, self.pattern = list(merges), pattern
        self.marks = pattern == PATTERN  # tiktoken's own encodings have none
        ranks = {token: rank for rank, token in enumerate(self.merges)}
        special = {name: len(ranks) + i for i, name in enumerate(SPECIAL)}
        self.encoding = tiktoken.Encoding(
            "parrot", pat_str=pattern, mergeable_ranks=ranks, special_tokens=special
        )
        self.n_vocab = len(ranks) + len(SPECIAL)
        self.endoftext, self.user, self.assistant, self.end, self.pad = special.values()

    @classmethod
    def train(cls, texts, vocab_size):
        """Learn a tokenizer from strings. vocab_size includes the bytes and the special tokens.

        Raises ValueError if vocab_size is under 261, or more than the text supports.
        """
        if vocab_size < MIN_VOCAB:
            raise ValueError(f"vocab_size must be at least {MIN_VOCAB}, not {vocab_size}")
        sample, room = [], SAMPLE
        for text in texts:
            sample.append(mark_capitals(text[:room]))
            room -= min(room, len(text))
            if not room:
                break
        learned = learn_merges(sample, vocab_size - MIN_VOCAB)
        most = MIN_VOCAB + len(learned)
        if most < vocab_size:
            raise ValueError(f"the text supports a vocab_size of {most} at most, not {vocab_size}")
        return cls([bytes([b]) for b in range(256)] + learned)

    @classmethod
    def named(cls, name):
        """One of tiktoken's own encodings, such as "gpt2", plus our special tokens."""
        encoding = tiktoken.get_encoding(name)  # its first use downloads it
        ranks = encoding._mergeable_ranks
        return cls(sorted(ranks, key=ranks.get), encoding._pat_str)

    def encode(self, text):
        """Text to a list of ids, never special ones."""
        return [i for piece in self.pieces(text) for i in self.encoding.encode_ordinary(piece)]

    def encode_to_array(self, text):
        """Like encode(), but an array, (n,) uint32. write_tokens() calls it on several threads."""
        encode = self.encoding.encode_to_numpy
        return np.concatenate([encode(p, disallowed_special=()) for p in self.pieces(text)])

    def pieces(self, text):
        """Cut the text inside very long words, or very long stretches of white space."""
        text = mark_capitals(text) if self.marks else text
        start = 0
        for end in range(LONGEST_RUN, len(text), LONGEST_RUN):
            if not BORDER.search(text, end - LONGEST_RUN, end):
                yield text[start:end]
                start = end
        yield text[start:]

    def decode(self, ids):
        """Ids to text. Special tokens appear by name; invalid UTF-8 becomes U+FFFD."""
        return self.decode_bytes(ids).decode("utf-8", "replace")

    def decode_bytes(self, ids):
        text = self.encoding.decode_bytes(list(ids))
        return unmark_capitals(text) if self.marks else text

    def count_bytes(self, ids):
        """How many bytes of text the ids, (n,) integers, stand for. Special tokens count 0."""
        ids = np.asarray(ids)
        return len(self.decode_bytes(ids[ids < self.endoftext].tolist()))

    def state(self):
        """What from_state() needs, in types that torch.load(weights_only=True) accepts."""
        return {"pattern": self.pattern, "merges": [t.decode("latin-1") for t in self.merges]}

    @classmethod
    def from_state(cls, state):
        """The tokenizer with this state()."""
        return cls([token.encode("latin-1") for token in state["merges"]], state["pattern"])
