"""
How the commands talk: one line for an error, and one line of progress.
"""

import functools
import os
import re
import shutil
import sys
import time
from collections import deque
from contextlib import suppress

LONGEST = 1000  # characters of an error that we show


class InputError(Exception):
    """Something is wrong with what the user gave us.

    It is shown as one line without a traceback: "WHERE: WHAT; WHAT TO DO".
    """

    def __init__(self, where, what, what_to_do):
        super().__init__(f"{where}: {what}; {what_to_do}")


def command(main):
    """Make main(argv) a well-behaved command.

    An InputError becomes one line and exit code 2. Ctrl-C becomes exit code 130. Programming errors
    keep their traceback.
    """

    @functools.wraps(main)
    def wrapper(argv=None):
        if hasattr(sys.stdout, "reconfigure"):
            sys.stdout.reconfigure(errors="replace")  # show "?" for what the console can't display
        try:
            result = main(argv)
            if sys.stdout is not None:
                sys.stdout.flush()  # so that a full disk shows here
            return result
        except InputError as error:
            fail(str(error))
        except KeyboardInterrupt as interrupt:
            if not interrupt.args:  # with arguments, the user has already been told
                with suppress(OSError):
                    print("\nInterrupted.", file=sys.stderr)
            leave_with(130)
        except BrokenPipeError:  # the reader closed the pipe
            leave_with(1)
        except OSError as error:
            what = f"{error.filename or 'files'}: {error.strerror or error}"
            fail(f"{what}; check the path, its permissions, and the free disk space")
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
            todo = "set --micro_batch_size for training, lower --length, or use a smaller model"
            fail(f"memory: out of memory; {todo}")

    return wrapper


def leave_with(code):
    """Exit. What can't be printed any more goes nowhere, or Python would complain about it."""
    try:
        sys.stdout.flush()
    except (OSError, ValueError, AttributeError):  # no reader, a full disk, or no output at all
        with suppress(OSError, ValueError, AttributeError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    sys.exit(code)


def is_out_of_memory(error):
    said = ("out of memory", "can't allocate memory", "not enough memory")  # CUDA, Linux, Windows
    told = isinstance(error, RuntimeError) and any(text in str(error) for text in said)
    return told or isinstance(error, MemoryError)


def fail(message):
    """Show an error as one line, and exit with code 2."""
    line = " ".join(message.split())
    if len(line) > LONGEST:
        line = f"{line[: LONGEST // 2]} ... {line[-LONGEST // 2 :]}"
    with suppress(OSError):
        print("error:", "".join(c if c.isprintable() else "?" for c in line), file=sys.stderr)
    leave_with(2)


class Progress:
    """How far along a job is, how fast it runs, and how long it will take.

    A terminal shows one line, rewritten in place. A file gets a new line every ten seconds.
    """

    RECENT = 10  # seconds that the rate looks back, so it soon forgets a slow stretch

    def __init__(self, label, total, done=0, unit=None):
        """unit: show the rate in this unit. Nothing is shown for a total of 0."""
        self.label, self.total, self.unit = label, total, unit
        self.live = sys.stderr is not None and sys.stderr.isatty()
        self.updates = deque([(time.perf_counter(), done)])
        self.next_line = self.updates[0][0] + (0 if self.live else 2)  # the first line comes early
        self.started, self.finished = False, total == 0

    def update(self, done, text=""):
        """done: how many of the total are done by now. text: what else to show."""
        now, last = time.perf_counter(), done >= self.total
        self.updates.append((now, done))
        while len(self.updates) > 2 and self.updates[1][0] <= now - self.RECENT:
            self.updates.popleft()
        due = now >= self.next_line or (last and self.started)
        if self.finished or not due:
            return
        self.started, self.finished = True, last
        self.next_line = now + (0.1 if self.live else 10)
        with suppress(OSError, ValueError):  # nobody may be reading it: the work goes on
            if self.live:
                width = shutil.get_terminal_size().columns - 1
                line = self.line(done, text, width).ljust(width)
                print("\r" + line, end="\n" if last else "", file=sys.stderr, flush=True)
            else:
                print(self.line(done, text), file=sys.stderr, flush=True)

    def line(self, done, text="", width=1000):
        """The line to show. In a narrow terminal, we drop the least important parts first."""
        (then, done_then), (now, _) = self.updates[0], self.updates[-1]
        rate = (done - done_then) / max(now - then, 1e-9)
        left = f"{clock((self.total - done) / rate)} left" if rate > 0 else ""
        if self.unit:
            text = f"{rate:,.{0 if rate >= 10 else 1}f} {self.unit}/s"
        filled = 10 * done // self.total
        bar, count = f"[{'#' * filled}{'.' * (10 - filled)}]", f"{done:,}/{self.total:,}"
        shorter_and_shorter = (
            [f"{self.label} {bar} {count}", left, text],
            [f"{self.label} {count}", left, text],
            [f"{self.label} {count}", left],
            [count, left],
        )
        for parts in shorter_and_shorter:
            line = "  ".join(part for part in parts if part)
            if len(line) <= width:
                break
        return line[:width]


def clock(seconds):
    """75 -> "1:15"."""
    return f"{int(seconds) // 60}:{int(seconds) % 60:02d}"


def readable(text, instead="?"):
    """The text without characters that can take over a terminal, or turn the reading direction."""
    odd = r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069]"
    return re.sub(odd, instead, text)
