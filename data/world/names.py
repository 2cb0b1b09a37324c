"""
Names, values and questions in running text: how to find them.
"""

import re


def pattern_of(phrases, flags=re.IGNORECASE):
    """A pattern that finds any of the phrases as whole words. It prefers the longest.

    It ignores case unless flags is 0.
    """
    longest_first = sorted(set(phrases), key=len, reverse=True)
    return re.compile(rf"(?<!\w)(?:{'|'.join(map(re.escape, longest_first))})(?!\w)", flags)


def normal(text):
    """The words of a text, without case and punctuation."""
    return re.sub(r"[\W_]+", " ", text.lower()).strip()


def bare(name):
    """The name without its article: "the Netherlands" -> "Netherlands"."""
    return re.sub("^the ", "", name, flags=re.IGNORECASE)
