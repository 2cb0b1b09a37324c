"""
Questions as people type them: in lower case, without punctuation, with typos, between other words.
"""

# How often each thing happens to a question.
BEFORE, AFTER = 0.12, 0.1  # chatter: "Hello, my son asks:", "thanks!"
LOWER, UPPER = 0.5, 0.06
NO_MARK, MORE_MARKS = 0.5, 0.1  # at the end of the question
SHORT_FORM, TYPO = 0.2, 0.3
NAME_TYPO = 0.2  # a typo in the name itself, where people make most of them
KEYWORDS, FEWER_WORDS = 0.15, 0.15  # without small words, or without some of them
SMALL_WORDS = frozenset(
    "a an the is are was were do does did of for to in on at by from with what which who whom "
    "whose how where when me my i you your we us it its that this there please tell can could "
    "would will name call called know say give want like just have has had be been and so".split()
)

SHORT_FORMS = {
    "what": "wat",
    "which": "wich",
    "the": "teh",
    "you": "u",
    "are": "r",
    "please": "pls",
    "people": "ppl",
    "because": "cuz",
    "to": "2",
    "what's": "whats",
    "who's": "whos",
    "don't": "dont",
    "is": "s",
    "and": "n",
    "does": "dose",
    "wrote": "rote",
    "know": "kno",
    "tell": "tel",
    "with": "w",
    "for": "4",
    "two": "2",
    "three": "3",
    "four": "4",
    "five": "5",
}
# What a slip of the pen or of the ear does to a few letters.
SLIPS = [
    ("ph", "f"),
    ("ll", "l"),
    ("nn", "n"),
    ("ss", "s"),
    ("tt", "t"),
    ("ck", "k"),
    ("ie", "ei"),
    ("ei", "ie"),
    ("y", "i"),
    ("c", "k"),
    ("z", "s"),
    ("s", "z"),
    ("ou", "u"),
    ("a", "e"),
    ("e", "a"),
    ("e", "i"),
    ("i", "e"),
    ("o", "u"),
    ("o", "a"),
    ("u", "o"),
    ("oo", "u"),
    ("ea", "ee"),
    ("th", "t"),
    ("qu", "kw"),
    ("x", "ks"),
    ("l", "ll"),
    ("n", "nn"),
    ("t", "tt"),
    ("p", "pp"),
]


def misspell(word, rng):
    """One typo in a word of at least three letters. Keeps the first letter, as people do."""
    i, kind = rng.randrange(1, len(word)), rng.random()
    if kind < 0.2:
        return word[:i] + word[i + 1 :]  # a letter is missing
    if kind < 0.35 and i + 1 < len(word):
        return word[:i] + word[i + 1] + word[i] + word[i + 2 :]  # two are swapped
    if kind < 0.5:
        return word[:i] + word[i] + word[i:]  # one is doubled
    slips = [slip for slip in SLIPS if slip[0] in word[1:]]
    if kind < 0.9 and slips:
        old, new = rng.choice(slips)
        return word[0] + word[1:].replace(old, new, 1)
    return word[:i] + rng.choice("aeioustrn") + word[i + 1 :]


def misspelled(text, rng):
    """The text with a typo in one of its words, if there is a word long enough."""
    words = text.split(" ")
    long = [k for k, word in enumerate(words) if len(word) > 2]
    if long:
        k = rng.choice(long)
        words[k] = misspell(words[k], rng)
    return " ".join(words)


def with_typos(text, rng):
    """The text with a typo in one or two of its longer words."""
    words = text.split(" ")
    long = [k for k, word in enumerate(words) if len(word) > 3 and word.strip("?.,!").isalpha()]
    for k in rng.sample(long, min(len(long), rng.choice((1, 1, 2)))):
        words[k] = misspell(words[k], rng)
    return " ".join(words)


def with_fewer_words(text, share, rng):
    """The text without a share of its small words.

    "What is the capital of Kenya?" becomes "capital Kenya?". After the first word, words with a
    capital letter stay, because they belong to names.
    """
    words = text.split(" ")
    kept = [
        word
        for k, word in enumerate(words)
        if (k and word[:1].isupper())
        or word.lower().strip("?.!,") not in SMALL_WORDS
        or rng.random() > share
    ]
    mark = words[-1][-1:] if words[-1][-1:] in ("?", "!") else ""
    short = " ".join(kept).rstrip("?!., ")
    return short + mark if len(kept) > 1 else text


def as_typed(question, rng, before, after, name=""):
    """The question as somebody might type it. before, after: chatter to put around it.

    name: what the question is about, and what is often misspelled.
    """
    text = question
    if rng.random() < KEYWORDS:
        text = with_fewer_words(text, 1.0, rng)
    elif rng.random() < FEWER_WORDS:
        text = with_fewer_words(text, 0.5, rng)
    if name and rng.random() < NAME_TYPO:
        text = text.replace(name, misspelled(name, rng))
    elif rng.random() < TYPO:
        text = with_typos(text, rng)
    if rng.random() < SHORT_FORM:
        words = text.split(" ")
        text = " ".join(SHORT_FORMS.get(w.lower(), w) if rng.random() < 0.5 else w for w in words)
    if rng.random() < NO_MARK:
        text = text.rstrip("?.! ") or text
    elif text[-1] in "?.!" and rng.random() < MORE_MARKS:
        text += rng.choice(("?", "??", "!", "!!"))
    if before and rng.random() < BEFORE:
        opener = rng.choice(before)
        if rng.random() < 0.7 and opener[-1] not in ".!?":
            text = text[0].lower() + text[1:] if text[1:2].islower() else text
        text = opener + " " + text
    if after and rng.random() < AFTER:
        gap = " " if text[-1] in "?.!" or rng.random() < 0.5 else ", "
        text += gap + rng.choice(after)
    case = rng.random()
    if case < LOWER:
        text = text.lower()
    elif case < LOWER + UPPER:
        text = text.upper()
    return text
