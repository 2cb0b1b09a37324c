"""
Command-line options: one for each field of a dataclass of settings.
"""

import argparse
import dataclasses

from common.messages import InputError

METAVARS = {int: "N", float: "X", str: "NAME"}


class Parser(argparse.ArgumentParser):
    """An ArgumentParser that takes exact names only, and whose errors are one line."""

    def __init__(self, prog, description=None):
        as_written = argparse.RawDescriptionHelpFormatter
        super().__init__(prog, None, description, allow_abbrev=False, formatter_class=as_written)

    def error(self, message):
        raise InputError("command line", message, f"see python {self.prog} --help")


def not_empty(text):
    """An argparse type for names and paths: not empty, and without a NUL byte."""
    if not text:
        raise argparse.ArgumentTypeError("must not be empty")
    if "\0" in text:
        raise argparse.ArgumentTypeError("must not contain a NUL byte")
    return text


def setting(default, help, least=None, most=None, below=None, metavar=None):
    """A field of a dataclass of settings, with its bounds.

    A value may be anything from least to most. Pass `below` instead of most to exclude the bound.
    metavar: what --help calls the value.
    """
    metadata = {"help": help, "least": least, "most": most, "below": below, "metavar": metavar}
    return dataclasses.field(default=default, metadata=metadata)


def parse_options(parser, Config, argv, preset=lambda args: {}):
    """Add one option for each field of the dataclass Config. Returns (config, all arguments).

    What the user typed beats preset(arguments), a dict. Both beat the defaults.
    """
    fields = dataclasses.fields(Config)
    for field in fields:
        add_option(parser, field)
    args = parser.parse_args(argv)
    typed = {f.name: getattr(args, f.name) for f in fields}
    typed = {name: value for name, value in typed.items() if value is not None}
    config = Config(**{**preset(args), **typed})
    for field in fields:
        check_bounds(field, getattr(config, field.name))
    return config, args


def add_option(parser, field):
    """Add --NAME. Its default is None, so we can tell what the user typed."""
    option, help = f"--{field.name}", field.metadata["help"]
    if field.type is bool:
        action = argparse.BooleanOptionalAction
        parser.add_argument(option, action=action, default=None, help=help)
        return
    if field.default != "":
        help += f" (default: {field.default})"
    kind = not_empty if field.type is str else field.type
    metavar = field.metadata["metavar"] or METAVARS[field.type]
    parser.add_argument(option, type=kind, metavar=metavar, help=help)


def check_bounds(field, value):
    """Raise InputError if a number is out of its bounds. NaN always is."""
    if field.type not in (int, float):
        return
    least, most, below = (field.metadata[key] for key in ("least", "most", "below"))
    whole = field.type is int
    if least is None:
        least = 1 if whole else 0
    if most is None:
        most = 10**9 if whole else 10**6
    fits = least <= value < below if below is not None else least <= value <= most
    if not fits:
        upto = most if below is None else f"just below {below}"
        todo = f"give a {'whole ' if whole else ''}number from {least} to {upto}"
        raise InputError(f"--{field.name}", f"{value} is out of range", todo)
