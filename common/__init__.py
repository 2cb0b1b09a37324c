"""
What every command does first, before it imports torch.
"""

import os
import sys

os.environ.setdefault("GOMP_SPINCOUNT", "10000")  # idle threads free the CPU for others sooner

for n in range(3):  # or the next file that we open would get the number of a closed stream
    try:
        os.fstat(n)
    except OSError:
        os.open(os.devnull, os.O_RDWR)


def show_error(kind, error, traceback):
    """One line for Ctrl-C, even while the imports are running. Else, what Python shows."""
    if issubclass(kind, KeyboardInterrupt):
        print("\nInterrupted.", file=sys.stderr)
    else:
        sys.__excepthook__(kind, error, traceback)


sys.excepthook = show_error
