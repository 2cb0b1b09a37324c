"""
How the commands behave: one line for what is wrong with an input, one line of progress, and files that are never half written.
"""

import argparse
import contextlib
import dataclasses
import functools
import os
import re
import shutil
import sys
import time
from pathlib import Path


class InputError(Exception):
    """Something is wrong with what the user gave: shown as one line, "WHERE: WHAT; WHAT TO DO", without a traceback."""

    def __init__(self, where, what, what_to_do):
        super().__init__(f"{where}: {what}; {what_to_do}")


class Parser(argparse.ArgumentParser):
    def error(self, message):
        raise InputError("command line", message, f"see python {self.prog} --help")


def not_empty(text):
    """For options that name something: argparse's type."""
    if not text:
        raise argparse.ArgumentTypeError("must not be empty")
    return text


def setting(default, help):
    """A field of a dataclass of settings."""
    return dataclasses.field(default=default, metadata={"help": help})


def parse_options(parser, Config, argv, preset=lambda args: {}):
    """Add one option for each field of the dataclass Config. Returns (config, all arguments).

    What is typed beats preset(arguments), a dict, which beats the defaults.
    """
    for f in dataclasses.fields(Config):
        text = f.metadata["help"] + (f" (default: {f.default})" if f.default != "" else "")
        if f.type is bool:
            parser.add_argument(f"--{f.name}", action=argparse.BooleanOptionalAction, default=None, help=f.metadata["help"])
        else:
            parser.add_argument(f"--{f.name}", type=not_empty if f.type is str else f.type, metavar=f.type.__name__.upper(), help=text)
    args = parser.parse_args(argv)
    typed = {f.name: getattr(args, f.name) for f in dataclasses.fields(Config) if getattr(args, f.name) is not None}
    config = Config(**{**preset(args), **typed})
    for f in dataclasses.fields(config):
        value = getattr(config, f.name)
        least = {"seed": 0, "micro_batch_size": 0, "block_size": 2}.get(f.name, 1)
        most = {"seed": 2**62, "batch_size": 10**6}.get(f.name, 10**9)
        if f.type is int and not least <= value <= most:
            raise InputError(f"--{f.name}", f"{value} is out of range", f"give a whole number from {least} to {most}")
        most = "below 1" if f.name == "dropout" else 10**6
        if f.type is float and not (0 <= value < 1 if f.name == "dropout" else 0 <= value <= most):
            raise InputError(f"--{f.name}", f"{value} is out of range", f"give a number from 0 to {most}")
    return config, args


def command(main):
    """Make main(argv) a well-behaved command: for an InputError one line and exit code 2, for Ctrl-C exit code 130."""

    @functools.wraps(main)
    def wrapper(argv=None):
        if hasattr(sys.stdout, "reconfigure"):
            sys.stdout.reconfigure(errors="replace")  # a console that lacks a letter shows "?" for it
        try:
            return main(argv)
        except InputError as error:
            fail(str(error))
        except KeyboardInterrupt as interrupt:
            if not interrupt.args:  # (with arguments, it has been said what has become of the run)
                print("\nInterrupted.", file=sys.stderr)
            sys.exit(130)
        except BrokenPipeError:  # who read what we print has had enough
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            sys.exit(1)
        except OSError as error:
            fail(f"{error.filename or 'files'}: {error.strerror}; check the path, its permissions, and the room on the disk")
        except (MemoryError, RuntimeError) as error:
            if isinstance(error, RuntimeError) and "out of memory" not in str(error) and "can't allocate memory" not in str(error):
                raise
            fail("memory: it does not suffice; lower --batch_size, set --micro_batch_size, or choose smaller sizes")

    return wrapper


def fail(message):
    line = " ".join(message.split())
    print("error:", "".join(c if c.isprintable() else "?" for c in line), file=sys.stderr)
    sys.exit(2)


def refuse_overwriting(inputs, outputs):
    """Raise InputError if one of the files that are read is one of those that will be written."""
    outputs = {Path(path).resolve() for path in outputs}
    for path in inputs:
        if Path(path).resolve() in outputs:
            raise InputError(path, "would be overwritten, as a file of this name is written to the output folder", "choose another --out")


@contextlib.contextmanager
def writing(path, mode="wb"):
    """Open a file to write, mode "wb" or "w", in a folder that is made if need be. What was at path stays until the last moment.

    It is written aside, flushed and renamed. Raises InputError if the disk is full or does not let us; then too, what was there stays.
    """
    aside = path.with_name(path.name + ".tmp")
    text = {} if mode == "wb" else {"encoding": "utf-8", "newline": "\n", "errors": "backslashreplace"}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(aside, mode, **text) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(aside, path)
    except (OSError, RuntimeError) as error:
        cause = error if isinstance(error, OSError) else error.__context__  # (torch.save stumbles when it tidies up after one)
        if not isinstance(cause, OSError):
            raise
        raise cannot_write(path, cause) from None
    finally:
        with contextlib.suppress(OSError):  # (it is gone if all went well)
            aside.unlink()


def cannot_write(path, error):
    """The InputError for an OSError."""
    return InputError(path, f"cannot be written ({error.strerror})", "make room or choose another --out; what was written before is intact")


class Progress:
    """One line that is rewritten in place; plain lines, ten seconds apart, where the output is not a terminal."""

    def __init__(self, label, total, done=0, unit=None):
        """unit: of what done counts, if its rate is to be shown. A total of 0 is not worth a line."""
        self.label, self.total, self.first, self.unit = label, total, done, unit
        self.live = sys.stderr is not None and sys.stderr.isatty()
        self.start = time.perf_counter()
        self.shown = self.start - 60 if self.live else self.start  # a person sees it at once
        self.finished = total == 0

    def update(self, done, text=""):
        """done of total are done; text: what else to show."""
        now = time.perf_counter()
        last = done >= self.total
        if self.finished or (now - self.shown < (0.1 if self.live else 10) and not (last and self.shown > self.start)):
            return
        self.shown, self.finished = now, last
        rate = (done - self.first) / (now - self.start)
        left = f"{clock((self.total - done) / rate)} left" if done > self.first else ""
        text = f"{rate:,.0f} {self.unit}/s" if self.unit else text
        filled = 20 * done // self.total
        line = f"{self.label} [{'#' * filled}{'.' * (20 - filled)}] {done:,}/{self.total:,}  {left}  {text}".rstrip()
        if self.live:
            width = shutil.get_terminal_size().columns - 1
            print("\r" + line[:width].ljust(width), end="\n" if last else "", file=sys.stderr, flush=True)
        else:
            print(line, file=sys.stderr)


def clock(seconds):
    """75 -> "1:15"."""
    return f"{int(seconds) // 60}:{int(seconds) % 60:02d}"


def readable(text, instead="?"):
    """The text without control characters, which could make a terminal do things, and have no place in a page."""
    return re.sub(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]", instead, text)
