"""
What counts as an answer. data/README.md has the rules.
"""

import re

from data.world import tables
from data.world.names import bare, pattern_of

OPTIONS = re.compile(r"^\s*[A-D]\)", re.MULTILINE)  # "A) Nairobi"


class Scorer:
    """Decides whether a completion answers a question of the embedded world."""

    def __init__(self):
        self.values = {}  # (table, attribute) -> every value that any entity accepts
        for entity in tables.load_facts()[0]:
            for fact in entity.facts:
                self.values.setdefault(fact.key, set()).update(fact.values)
        self.patterns = {key: pattern_of(values, flags=0) for key, values in self.values.items()}

    def answered(self, item, text):
        """Whether the text states the right value and no other value of the attribute.

        A list of options isn't an answer, and neither is a question.
        """
        if OPTIONS.search(text) or "?" in text:
            return False
        return self.right(item, text)

    def right(self, item, text):
        if "keys" in item:
            return all(pattern_of(phrases).search(text) for phrases in item["keys"])
        name = pattern_of([bare(item["name"])])
        # Take out the name, because it may look like a value. But keep "Mexico" in "Mexico City".
        if not any(name.search(value) for value in item["accept"]):
            text = name.sub(" ", text)
        found = set(self.patterns[item["table"], item["attribute"]].findall(text))
        return bool(found) and found <= set(item["accept"])

    def knows(self, item, text):
        """Whether a cloze ("The capital of France is") continues with the right value."""
        if "keys" in item:
            return self.right(item, text.split("\n")[0])
        values = "|".join(map(re.escape, item["accept"]))
        return bool(re.match(rf"\s*(?:an? |the )?(?:{values})(?!\w)", text))
