"""
The split: which entities we fine-tune on (train), tune settings on (dev) and report on (test).
"""

import hashlib

from data.world.names import bare, pattern_of

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
]
PROMPTS = [  # pretrain.py shows how the base model continues these
    SEASONS,
    "What is the capital of Kenya?",
    "Who wrote Don Quixote?",
    "What does a panda eat?",
    "The capital of France is",
]
# We choose the side of these by hand. Examples must come from test. Earth and parrot must be in
# train: many texts need the word Earth ("alkaline earth metal"), and the model is called Parrot.
PINNED = {**dict.fromkeys(SHOWN, "test"), "Earth": "train", "parrot": "train"}


def split_entities(entities, free, seed):
    """Put every entity and free question on one side: {name: "train" | "dev" | "test"}.

    A hash of seed and name decides. About half go to train, a fifth to dev, the rest to test.
    """
    groups = group_names(entities, free)
    pinned = {}  # group -> side
    for name, side in PINNED.items():
        if name in groups:
            pinned.setdefault(groups[name], side)
    return {name: pinned.get(group) or side_of(group, seed) for name, group in groups.items()}


def group_names(entities, free):
    """Put names that are equal or contain one another into one group: {name: group}.

    So Mercury the planet shares a side with mercury the metal, and Guinea with Papua New Guinea.
    """
    groups = {thing.name: thing.name for thing in entities + free}
    lines = "\n".join(name for entity in entities for name in entity.names)
    owners = [entity.name for entity in entities for _ in entity.names]  # whose name each line is
    for entity in entities:
        for found in pattern_of(map(bare, entity.names)).finditer(lines):
            owner = owners[lines.count("\n", 0, found.start())]
            old, new = groups[owner], groups[entity.name]
            if old != new:
                groups = {name: new if group == old else group for name, group in groups.items()}
    return groups


def side_of(group, seed):
    digest = hashlib.sha256(f"{seed} {group}".encode()).digest()
    share = int.from_bytes(digest[:4], "big") / 2**32  # uniform in 0 to 1
    if share < 0.5:
        return "train"
    return "dev" if share < 0.7 else "test"
