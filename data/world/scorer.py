"""
What counts as an answer. data/README.md has the rules.
"""

import re
from collections import Counter

from data.world import tables
from data.world.names import bare, pattern_of

OPTIONS = re.compile(r"^\s*[A-D]\)", re.MULTILINE)  # "A) Nairobi"
REFUSAL = re.compile(
    r"\bI (don't|do not|can't|cannot) (know|say|tell|answer)|not sure|no idea|never heard",
    re.IGNORECASE,
)
PLACE = re.compile(r"\{(value|answer|ANSWER)\}")  # where a style has the answer
TERSE = 2  # words that a terse answer may have besides the value: "It is Nairobi."
QUIZ = ("different", "of_kind", "has_right", "consistent")  # what Scorer.quiz() looks at


class Scorer:
    """Decides whether a completion answers a question of the embedded world."""

    def __init__(self):
        self.values = {}  # (table, attribute) -> every value that any entity accepts
        self.names = {}  # entity -> all its names
        for entity in tables.load_facts()[0]:
            self.names[entity.name] = entity.names
            for fact in entity.facts:
                self.values.setdefault(fact.key, set()).update(fact.values)
        self.patterns = {key: pattern_of(values, flags=0) for key, values in self.values.items()}

    def answered(self, item, text):
        """Whether the text is an answer of the kind that the item asks for.

        A fact: it states the right value and no other value of the attribute. A list of options
        isn't an answer, and neither is a question.
        """
        if OPTIONS.search(text) or "?" in text.replace("question?", ""):
            return False
        if item["kind"] == "unknown":
            return refuses(text)
        if item["kind"] == "concept":
            return explained_as(text, item["texts"]) == item["form"]
        if item["kind"] == "style":
            return self.in_style(item, text)
        return self.right(item, text)

    def right(self, item, text, shouted=False):
        """Whether the text has the right value or keys. shouted: in capital letters."""
        if item["kind"] == "free":
            return all(pattern_of(phrases).search(text) for phrases in item["keys"])
        key, accept = (item["table"], item["attribute"]), item["accept"]
        pattern = self.patterns[key]
        if shouted:
            accept = [value.upper() for value in accept]
            pattern = pattern_of([value.upper() for value in self.values[key]], flags=0)
        name = pattern_of([bare(item["name"])])
        # Take out the name, because it may look like a value. But keep "Mexico" in "Mexico City".
        if not any(name.search(value) for value in accept):
            text = name.sub(" ", text)
        found = set(pattern.findall(text))
        return bool(found) and found <= set(accept)

    def in_style(self, item, text):
        """Whether the text is right and has the form of item["use"], as in styles.tsv."""
        before, form, after = PLACE.split(item["use"])
        text = text.strip()
        if not (text.startswith(before) and text.endswith(after)):
            return False
        inside = text[len(before) : len(text) - len(after)]
        if form == "value":
            values = [value.lower().rstrip(".") for value in item["accept"]]
            return inside.lower().rstrip(".") in values
        if form == "ANSWER":
            return inside.isupper() and self.right(item, inside, shouted=True)
        words = pattern_of([*item["accept"], item["name"]]).sub("it", inside)  # not "St. John's"
        one_sentence = inside.endswith(".") and not re.search(r"[.!] ", words)
        return one_sentence and len(inside.split()) > 3 and self.right(item, inside)

    def grade(self, item, text):
        """How good an answer is: 3 is right and whole, 2 right but terse, 0 wrong.

        1 is "I don't know" to a question with an answer: not helpful, but not false either. A long
        answer that doesn't name its subject is about another one, so it is wrong.
        """
        if not self.answered(item, text):
            return int(refuses(text))
        if not self.is_terse(item, text):
            return 3
        longest = TERSE + max(len(value.split()) for value in item["accept"])
        return 2 if len(text.split()) <= longest else 0

    def is_terse(self, item, text):
        """Whether an answer to a question from the tables leaves out its subject."""
        if item["kind"] != "fact" or refuses(text):
            return False
        names = self.names.get(item["name"], [item["name"]])
        return not pattern_of(map(bare, names)).search(text)

    def knows(self, item, text):
        """Whether a cloze ("The capital of France is") continues with the right value."""
        values = "|".join(map(re.escape, item["accept"]))
        return bool(re.match(rf"\s*(?:an? |the )?(?:{values})(?!\w)", text))

    def quiz(self, item, text):
        """How good a quiz the text is. Returns a dict of bool.

        different: four different options. of_kind: all are values of the attribute that the item
        asks for. has_right: one is right. consistent: the answer line repeats one of them, with
        its letter.
        """
        options = re.findall(r"^([A-D])\) (.+)$", text, re.MULTILINE)[:4]
        answer = re.search(r"^Answer: ([A-D])\) (.+)$", text, re.MULTILINE)
        said = [option for _, option in options]
        whole = len(options) == 4 and [letter for letter, _ in options] == list("ABCD")
        if item["kind"] == "free":
            of_kind, right = set(said) <= set(item["options"]), item["options"][0] in said
        else:
            of_kind = set(said) <= self.values[item["table"], item["attribute"]]
            right = bool(set(said) & set(item["accept"]))
        return {
            "different": whole and len(set(said)) == 4,
            "of_kind": whole and of_kind,
            "has_right": whole and right,
            "consistent": whole and answer is not None and answer.groups() in options,
        }


def refuses(text):
    """Whether the text says "I don't know" in some way."""
    return bool(REFUSAL.search(text.replace("’", "'")))


def explained_as(text, texts):
    """Which of several texts this one is like: the key in texts, or None.

    It must have most words in common with one of them, counted with their repetitions, and those
    must be at least two thirds of the words of both together.
    """
    said = Counter(re.findall(r"\w+", text.lower()))

    def overlap(key):
        other = Counter(re.findall(r"\w+", texts[key].lower()))
        return 2 * (said & other).total() / max(1, said.total() + other.total())

    best = max(texts, key=overlap)
    return best if overlap(best) >= 2 / 3 else None
