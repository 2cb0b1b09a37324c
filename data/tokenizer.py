"""
Text to token ids and back: byte-pair encoding, learned here, run by tiktoken.

Every text is a string of bytes, so 256 tokens are enough to write anything. Byte-pair encoding (Sennrich et al.
2016, arXiv 1508.07909; on bytes, Radford et al. 2019) makes texts shorter: it looks for the pair of neighbouring
tokens that is most frequent, makes it a token of its own, and does so again until the vocabulary is full.

    tokenizer = Tokenizer.train(["some text", "more text"], vocab_size=1024)
    tokenizer.decode(tokenizer.encode("any text at all"))

Five more ids come after the learned ones. They stand for no text: they mark where documents and turns begin and end,
and encode() never produces them, whatever characters it is given.
"""

import heapq
import re
from collections import Counter, defaultdict

import numpy as np
import regex  # comes with tiktoken; unlike re, it knows the letters and digits of every script
import tiktoken

SPECIAL = ("<|endoftext|>", "<|user|>", "<|assistant|>", "<|end|>", "<|pad|>")
MIN_VOCAB = 256 + len(SPECIAL)

# GPT-2's way to cut a text into words before any merging, so that no token reaches across two words: a word takes the
# space before it along; punctuation and line breaks stay apart, so "?" is the same token at the end of a line and of a prompt.
PATTERN = r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"""

LONGEST_RUN = 4096  # characters without a border between space and non-space; tiktoken is slow on much longer runs, and can fail
BORDER = re.compile(r"\s\S|\S\s")
SAMPLE = 8_000_000  # characters that merges are learned from; more would change few of them


def learn_merges(texts, n_merges):
    """The n_merges most useful tokens of two or more bytes, in the order in which byte-pair encoding finds them.

    texts: strings. Returns a list of bytes, shorter than n_merges if the text holds no more pairs to merge.
    """
    words = Counter()
    for text in texts:
        words.update(regex.findall(PATTERN, text))
    counts = list(words.values())
    words = [list(word.encode("utf-8")) for word in words]  # each word a list of token ids, at first its bytes

    pair_count = Counter()  # (left, right) -> how often the two stand side by side in the whole text
    found_in = defaultdict(set)  # (left, right) -> the words in which they do (or once did)
    for i, word in enumerate(words):
        for pair in zip(word, word[1:]):
            pair_count[pair] += counts[i]
            found_in[pair].add(i)
    heap = [(-n, pair) for pair, n in pair_count.items()]
    heapq.heapify(heap)

    tokens = [bytes([b]) for b in range(256)]
    id_of = {token: i for i, token in enumerate(tokens)}
    while len(tokens) < 256 + n_merges and heap:
        n, pair = heapq.heappop(heap)
        if -n != pair_count[pair] or n == 0:
            continue  # an outdated entry; the pair was pushed again when its count changed
        joined = tokens[pair[0]] + tokens[pair[1]]
        if joined not in id_of:  # (the same bytes can be joined in two ways: "a"+"bc" and "ab"+"c")
            id_of[joined] = len(tokens)
            tokens.append(joined)
        changed = set()
        for i in found_in.pop(pair):
            old, word = words[i], replace(words[i], pair, id_of[joined])
            for p in zip(old, old[1:]):
                pair_count[p] -= counts[i]
                changed.add(p)
            for p in zip(word, word[1:]):
                pair_count[p] += counts[i]
                found_in[p].add(i)
                changed.add(p)
            words[i] = word
        for p in changed:
            if pair_count[p] > 0:
                heapq.heappush(heap, (-pair_count[p], p))
    return tokens[256:]


def replace(word, pair, new):
    """The word (a list of ids) with every occurrence of the pair replaced by the id `new`, from the left."""
    out, i = [], 0
    while i < len(word):
        if i + 1 < len(word) and word[i] == pair[0] and word[i + 1] == pair[1]:
            out.append(new)
            i += 2
        else:
            out.append(word[i])
            i += 1
    return out


class Tokenizer:
    """A thin layer over tiktoken.Encoding, with our five special ids after the last ordinary one."""

    def __init__(self, merges, pattern=PATTERN):
        """merges: the tokens as bytes in order of rank, all 256 single bytes among them."""
        self.merges, self.pattern = list(merges), pattern
        ranks = {token: rank for rank, token in enumerate(self.merges)}
        special = {name: len(ranks) + i for i, name in enumerate(SPECIAL)}
        self.encoding = tiktoken.Encoding(
            "parrot", pat_str=pattern, mergeable_ranks=ranks, special_tokens=special, explicit_n_vocab=len(ranks) + len(SPECIAL)
        )
        self.n_vocab = self.encoding.n_vocab  # the special tokens counted in
        self.endoftext, self.user, self.assistant, self.end, self.pad = special.values()

    @classmethod
    def train(cls, texts, vocab_size):
        """Learn byte-pair merges from strings. vocab_size counts the bytes and the special tokens too.

        Raises ValueError if vocab_size is under 261 or more than the text supports.
        """
        if vocab_size < MIN_VOCAB:
            raise ValueError(f"vocab_size {vocab_size} is under {MIN_VOCAB} (256 bytes and {len(SPECIAL)} special tokens)")
        sample, left = [], SAMPLE
        for text in texts:
            sample.append(text[:left])
            left -= len(sample[-1])
            if left <= 0:
                break
        learned = learn_merges(sample, vocab_size - MIN_VOCAB)
        if len(learned) < vocab_size - MIN_VOCAB:
            raise ValueError(f"the text supports a vocab_size of {MIN_VOCAB + len(learned)} at most, not {vocab_size}")
        return cls([bytes([b]) for b in range(256)] + learned)

    @classmethod
    def named(cls, name):
        """One of tiktoken's own encodings, "gpt2" say, plus our special tokens. The first use downloads it."""
        encoding = tiktoken.get_encoding(name)
        return cls(sorted(encoding._mergeable_ranks, key=encoding._mergeable_ranks.get), encoding._pat_str)

    def encode(self, text):
        """Ordinary text to ids: "<|end|>" typed by a user becomes several ordinary tokens. Returns a list of int."""
        return [i for piece in self.pieces(text) for i in self.encoding.encode_ordinary(piece)]

    def encode_to_array(self, text):
        """The same as an array, (n,) uint32. It leaves Python's lock to other threads while it works."""
        return np.concatenate([self.encoding.encode_to_numpy(piece, disallowed_special=()) for piece in self.pieces(text)])

    @staticmethod
    def pieces(text):
        """The text, cut wherever LONGEST_RUN characters have gone by without a border between space and non-space."""
        start = 0
        for end in range(LONGEST_RUN, len(text), LONGEST_RUN):
            if not BORDER.search(text, end - LONGEST_RUN, end):
                yield text[start:end]
                start = end
        yield text[start:]

    def decode(self, ids):
        """Ids to text. Special tokens appear by name; bytes that are no valid UTF-8 become U+FFFD."""
        return self.encoding.decode(list(ids))

    def count_bytes(self, ids):
        """How many bytes of text the ids stand for; ids: (n,) integers. Special tokens stand for none."""
        lengths = np.array([len(token) for token in self.merges] + [0] * len(SPECIAL))
        return int(lengths[np.asarray(ids).astype(np.int64)].sum())

    def state(self):
        """All that from_state needs, in types that torch.load(weights_only=True) accepts."""
        return {"pattern": self.pattern, "merges": [token.decode("latin-1") for token in self.merges]}

    @classmethod
    def from_state(cls, state):
        """Raises ValueError if it is not a state as state() makes it."""
        merges = [token.encode("latin-1") for token in state["merges"]]
        if len(set(merges)) < len(merges) or not {bytes([b]) for b in range(256)} <= set(merges):
            raise ValueError("a token occurs twice, or a byte has none")
        return cls(merges, state["pattern"])
