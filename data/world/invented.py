"""
Names of things that don't exist, made by rule: the model must say that it doesn't know them.

There are so many that a model can't learn them by heart. Each belongs to train, dev or test, like
the real names.
"""

import re

from data.world.names import bare
from data.world.split import side_of

FORMS = {  # the kind of name that stands for an entity of a table
    "countries": "form_country",
    "elements": "form_element",
    "animals": "form_animal",
    "planets": "form_planet",
    "inventions": "form_invention",
    "books": "form_title",
    "paintings": "form_title",
    "music": "form_music",
    "landforms": "form_landform",
    "people": "form_person",
    "opposites": "form_animal",
}


class Inventor:
    """Makes names whose side is one of `sides`, out of the parts in invented.tsv.

    real: names that exist, because "Pa", "ki" and "stan" are parts, too.
    """

    def __init__(self, parts, sides, rng, real=()):
        self.parts, self.sides, self.rng = parts, sides, rng
        self.real = {bare(name).lower() for name in real}

    def name(self, table):
        """A new name for something that could be in this table, but isn't."""
        return self.make(FORMS.get(table, "form_country"))

    def make(self, form):
        while True:
            name = template = self.rng.choice(self.parts[form])
            while "{" in name:
                name = re.sub(r"\{(\w+)\}", lambda m: self.rng.choice(self.parts[m[1]]), name)
            if form not in ("form_element", "form_animal"):
                name = capitalized(name, the="the" if name.startswith("the ") else "The")
            if side_of(name, "invented") in self.sides and not self.exists(name, template):
                return name

    def exists(self, name, template):
        """Whether the name is a real one. "the Volga River" is, because "Volga" is."""
        made = [name]
        if "{start}" in template:  # its other words may be anything: "the", "River"
            made += [word for word in name.split() if word not in template.split()]
        return any(bare(word).lower() in self.real for word in made)


def plural_of(name):
    """Three falwings, three talfishes: the invented beasts follow the rule."""
    return name + ("es" if name.endswith(("s", "x", "sh")) else "s")


def capitalized(name, the):
    """Each word of a name with a capital, except the small words between."""
    small = ("of", "the", "and", "for", "in", "with", "von", "a")
    words = [word if word in small else word[0].upper() + word[1:] for word in name.split()]
    first = the if words[0].lower() == "the" else words[0][0].upper() + words[0][1:]
    return " ".join([first, *words[1:]])
