"""
The split: what we fine-tune on (train), tune settings on (dev) and report on (test).
"""

import hashlib

from data.world.names import bare, normal, pattern_of

SEASONS = "What is the primary cause of Earth's seasons?"
SHOWN = [  # the examples of compare.py
    SEASONS,
    "Kenya",
    "Don Quixote",
    "silver",
    "panda",
    "Why is the sky blue on a clear day?",
    "Japan",
    "penicillin",
    "gravity",
    "the printing press",
]
PROMPTS = [  # pretrain.py shows how the base model continues these
    SEASONS,
    "What is the capital of Kenya?",
    "Who wrote Don Quixote?",
    "What does a panda eat?",
    "The capital of France is",
]
# Words such as "water" are in train, all of them: no conversation could do without them.
WORDS = ("opposites",)
# We choose the side of these by hand. Examples must come from test. Earth and parrot must be in
# train: many texts need the word Earth ("alkaline earth metal"), and the model is called Parrot.
PINNED = {**dict.fromkeys(SHOWN, "test"), "Earth": "train", "parrot": "train"}


def split_entities(entities, free, seed):
    """Put everything on one side: {name: "train" | "dev" | "test"}.

    free: free questions and concepts. A hash of seed and name decides: 80% go to train,
    7% to dev, and 13% to test.
    """
    words = {entity.name: "train" for entity in entities if entity.table in WORDS}
    groups = group_names([entity for entity in entities if entity.name not in words], free)
    pinned = {}  # group -> side
    for name, side in PINNED.items():
        if name in groups:
            pinned.setdefault(groups[name], side)
    sides = {name: pinned.get(group) or side_of(group, seed) for name, group in groups.items()}
    return sides | words


def group_names(entities, free):
    """Put names that are equal or contain one another into one group: {name: group}.

    So Mercury the planet shares a side with mercury the metal, and Guinea with Papua New Guinea.
    A free question and a concept share a side if both are asked for in the same words.
    """
    groups = {thing.name: thing.name for thing in entities + free}

    def join(a, b):
        old, new = groups[a], groups[b]
        for name, group in groups.items():
            groups[name] = new if group == old else group

    first = {}  # question -> the first thing that it asks for
    for thing in free:
        for question in map(normal, thing.questions):
            if groups[first.setdefault(question, thing.name)] != groups[thing.name]:
                join(first[question], thing.name)
    lines = "\n".join(name for entity in entities for name in entity.names)
    owners = [entity.name for entity in entities for _ in entity.names]  # whose name each line is
    for entity in entities:
        for found in pattern_of(map(bare, entity.names)).finditer(lines):
            owner = owners[lines.count("\n", 0, found.start())]
            if groups[owner] != groups[entity.name]:
                join(owner, entity.name)
    return groups


def side_of(group, seed):
    digest = hashlib.sha256(f"{seed} {group}".encode()).digest()
    share = int.from_bytes(digest[:4], "big") / 2**32  # uniform in 0 to 1
    if share < 0.8:
        return "train"
    return "dev" if share < 0.87 else "test"
