"""
Files: how we read them, and how we write them so that none is ever left half written.
"""

import codecs
import contextlib
import errno
import glob
import hashlib
import io
import itertools
import json
import os
import re
import secrets
import stat
from pathlib import Path

from filelock import FileLock, Timeout  # comes with torch

from common.messages import InputError

PIECE = 2**20  # bytes to read at a time
DEEPEST = 50  # levels of lists and objects in JSON; conversations need four


# Reading


def check_file(path):
    """Raise InputError unless path is a regular file that we can open.

    Opening a FIFO would wait forever for somebody to write to it.
    """
    try:
        mode = os.stat(path).st_mode
        if stat.S_ISDIR(mode):
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
        if not stat.S_ISREG(mode):
            todo = "give a file on a disk, not a pipe, a socket or a device"
            raise InputError(path, "not a regular file", todo)
        open(path, "rb").close()
    except OSError as error:
        raise cannot_read(path, error) from None
    except ValueError:
        raise InputError(path, "a path can't contain a NUL byte", "check the path") from None


def cannot_read(path, error):
    """The InputError for an OSError."""
    if isinstance(error, FileNotFoundError):
        return InputError(path, "no such file or folder", "check the path")
    what = f"cannot be read ({error.strerror})"
    return InputError(path, what, "check the path and its permissions")


def find_files(paths):
    """List the files that paths name, in order. A folder stands for all .txt and .md files in it.

    Raises InputError for a file that we can't open, and for a folder without such files.
    """
    files = []
    for path in map(Path, paths):
        if os.path.isdir(path):
            inside = sorted(p for p in path.rglob("*") if p.suffix.lower() in (".txt", ".md"))
            found = [p for p in inside if p.is_file()]
            if not found:
                what = "the folder holds no .txt or .md file"
                raise InputError(path, what, "name the files instead of the folder")
            files += found
        else:
            check_file(path)
            files.append(path)
    return list(dict.fromkeys(files))


def read_pieces(path, look=lambda raw: None):
    """Yield the text of a UTF-8 file in strings of at most PIECE characters.

    A byte order mark is dropped; \\r\\n and \\r become \\n. look(raw) sees the bytes of each piece.
    Raises InputError for a file that we can't read or that isn't UTF-8.
    """
    check_file(path)
    utf8 = codecs.getincrementaldecoder("utf-8-sig")()
    decoder = io.IncrementalNewlineDecoder(utf8, translate=True)
    n = 0  # bytes so far
    try:
        with open(path, "rb") as file:
            while raw := file.read(PIECE):
                n += len(raw)
                look(raw)
                yield decoder.decode(raw)
            yield decoder.decode(b"", final=True)
    except UnicodeDecodeError as error:
        at = n - len(error.object) + error.start
        raise InputError(path, f"not UTF-8 text (byte {at})", "save it as UTF-8") from None
    except OSError as error:
        raise cannot_read(path, error) from None


def sha256_of(*paths):
    """A hash of the bytes of files, one after the other. A missing file counts as an empty one."""
    digest = hashlib.sha256()
    for path in paths:
        if path.is_file():
            with open(path, "rb") as file:
                while piece := file.read(PIECE):
                    digest.update(piece)
    return digest.hexdigest()


def read_json(path):
    """The entries of a JSON Lines file or a JSON array, as [(where, entry)].

    where names the file and the line or entry, for messages. Raises InputError for a file that we
    can't read, that isn't JSON, or that holds nothing.
    """
    path, text = Path(path), "".join(read_pieces(path))
    if text.lstrip().startswith("["):
        array = parse_json(text, path, 1, "fix the array")
        entries = [(f"{path} entry {i}", entry) for i, entry in enumerate(array, start=1)]
    else:
        entries = []
        for number, line in enumerate(text.split("\n"), start=1):
            if line.strip():
                entry = parse_json(line, path, number, "put one object on each line")
                entries.append((f"{path} line {number}", entry))
    for where, entry in entries:
        if is_too_deep(entry):
            what = f"the JSON has too much nesting (more than {DEEPEST} levels deep)"
            raise InputError(where, what, "nest lists and objects less deeply")
    if not entries:
        raise InputError(path, "the file holds nothing", "give at least one entry")
    return entries


def parse_json(text, path, first_line, what_to_do):
    """json.loads for text that starts at first_line of the file. Raises InputError."""
    try:
        return json.loads(text)
    except RecursionError:
        why = "too many levels deep"
        depth = itertools.accumulate((c in "[{") - (c in "]}") for c in text)
        at = next((i for i, d in enumerate(depth) if d > DEEPEST), 0)
        line = first_line + text.count("\n", 0, at)
    except json.JSONDecodeError as error:
        why, line = error.msg, first_line + error.lineno - 1
    except ValueError as error:  # a number with thousands of digits
        why, line = error, first_line
    raise InputError(f"{path} line {line}", f"broken JSON ({why})", what_to_do)


def is_too_deep(entry):
    """Whether JSON, or what torch.load read, might reach Python's limit for recursion.

    Also if two of its parts are one and the same, for then it may be far larger than its file.
    """
    level, seen = [entry], set()
    for _ in range(DEEPEST + 1):
        level = [child for value in level for child in children(value)]
        if not level:
            return False
        inner = [id(value) for value in level if children(value)]
        if not seen.isdisjoint(inner) or len(set(inner)) < len(inner):
            return True
        seen.update(inner)
    return True


def children(value):
    if isinstance(value, dict):
        return value.values()
    return value if isinstance(value, list | tuple) else ()


def read_log(path):
    """The rows of a finished run's log, or [] if there is no such log."""
    try:
        unfinished = path.with_suffix(".resume.pt").exists()
        return [] if unfinished else [row for _, row in read_json(path)]
    except InputError:
        return []


# Writing


def refuse_overwriting(inputs, outputs):
    """Raise InputError if we would overwrite an input."""
    written = {os.path.realpath(path) for path in outputs}
    for path in inputs:
        if os.path.realpath(path) in written:
            what = "would be overwritten by a file in the output folder"
            raise InputError(path, what, "choose another --out")


@contextlib.contextmanager
def writing(path, mode="wb", keep=None):
    """Open a file for writing, in mode "wb" or "w". Its folder is made if it doesn't exist.

    We write to a new file beside it and rename that at the end. Until then, and after any error,
    the old file stays as it was. keep: what to call the old file afterwards; else it is gone.
    Raises InputError if the disk is full or we aren't allowed to write.
    """
    text = {"encoding": "utf-8", "newline": "\n", "errors": "backslashreplace"}
    aside = path.with_name(f"{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        # "x" makes a new file: it never opens one that exists, nor follows a link.
        opened = open(aside, mode.replace("w", "x"), **(text if mode == "w" else {}))
    except OSError as error:
        raise cannot_write(path, error) from None
    try:
        with opened as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        replace(aside, path, keep)
    except (OSError, RuntimeError) as error:
        # torch.save may raise a RuntimeError while it cleans up after an OSError.
        cause = error if isinstance(error, OSError) else error.__context__
        if not isinstance(cause, OSError):
            raise
        raise cannot_write(path, cause) from None
    finally:
        with contextlib.suppress(OSError):  # after a success, it no longer exists
            aside.unlink()


def replace(new, path, keep=None):
    """Rename a file, and write the new name to the disk. keep: see writing()."""
    if keep and path.exists():
        os.replace(path, keep)
    os.replace(new, path)
    with contextlib.suppress(OSError):  # Windows opens no folders, and some systems flush none
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def older(path):
    """What we call a file that we keep although a new one takes its name."""
    return path.with_name(f"{path.stem}.previous{path.suffix}")


def remove_leftovers(paths):
    """Remove what writing() left beside these files when the process was killed."""
    for path in paths:
        for aside in path.parent.glob(f"{glob.escape(path.name)}.*.tmp"):
            if re.fullmatch(r"\.[0-9a-f]{8}\.tmp", aside.name[len(path.name) :]):
                aside.unlink(missing_ok=True)


def cannot_write(path, error):
    """The InputError for an OSError."""
    todo = "check the disk's space, or choose another --out; files written before are intact"
    return InputError(path, f"cannot be written ({error.strerror})", todo)


# One run at a time in an output folder

LOCKS = {}  # folder -> its lock, which the system frees when the process ends


def lock(folder):
    """Claim a folder for this process. Raises InputError if another one has it."""
    key = os.path.realpath(folder)
    if key in LOCKS:
        return
    holder = folder / ".lock.holder"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        taken = FileLock(folder / ".lock")
        taken.acquire(timeout=0)
        holder.write_text(f"process {os.getpid()}", encoding="utf-8")
    except Timeout:
        who = holder.read_text(encoding="utf-8") if holder.is_file() else "unknown"
        what = f"another run writes here ({who})"
        raise InputError(folder, what, "wait until it ends, or choose another --out") from None
    except OSError as error:
        if error.errno in (errno.ENOTSUP, errno.ENOLCK):  # no locks here, as on some network disks
            return
        raise cannot_write(folder, error) from None
    LOCKS[key] = taken


def unlock(folder):
    """Free a folder that this process may have claimed."""
    if taken := LOCKS.pop(os.path.realpath(folder), None):
        taken.release()
