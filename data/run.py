"""
What a training run keeps on the disk, and how it is stopped and goes on.
"""

import dataclasses
import json
import os
import signal
from pathlib import Path

import torch
import torch.distributed as dist

from data.machine import processes
from data.terminal import InputError, cannot_write, writing

LOG_EVERY = 10  # steps


def read_torch(path):
    """torch.load, of data only: nothing in the file is executed. Raises InputError for a file that is damaged or another's."""
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # whatever a file of other bytes makes the unpickler stumble over
        raise InputError(path, f"not a checkpoint that can be read ({type(error).__name__})", "make it again") from None


class CtrlC:
    """While this is open, the first Ctrl-C only sets .pressed, so that the loop can stop between two steps."""

    def __enter__(self):
        self.pressed, self.before = False, signal.signal(signal.SIGINT, self.note)
        return self

    def note(self, *_):
        self.pressed = True
        if processes()[0] == 0:
            second = "" if dist.is_initialized() else " (A second Ctrl-C stops at once, and nothing is saved.)"
            text = f"\nStopping within {LOG_EVERY} steps, to save.{second}\n"
            os.write(2, text.encode())  # (a signal can come in the middle of a print, and another print then fails)
        if not dist.is_initialized():  # (torchrun hands a Ctrl-C on to processes that have had it already)
            signal.signal(signal.SIGINT, self.before)  # the second one stops at once

    def __exit__(self, *_):
        signal.signal(signal.SIGINT, self.before)


class Run:
    """What a run that is not finished keeps on the disk: its log, and the file from which --resume goes on."""

    def __init__(self, config, name, about):
        """about: a dict of what must be the same when the run is resumed, besides the settings.

        .state is what was saved, or None without --resume. Raises InputError if there is nothing to resume, or it is another run.
        """
        self.name, out = name, Path(config.out)
        self.log, self.unfinished = out / f"{name}.jsonl", out / f"{name}.resume.pt"
        settings = {key: value for key, value in dataclasses.asdict(config).items() if key not in ("out", "resume", "device", "base")}
        self.about = {**settings, "processes": processes()[1], **about}
        self.state = self.load() if config.resume else None

    def load(self):
        if not self.unfinished.exists():
            raise InputError("--resume", f"there is no unfinished run ({self.unfinished})", "run without --resume, if it has not finished")
        state = read_torch(self.unfinished)
        if not isinstance(state, dict) or not {"model", "optimizers", "step", "tokens", "dtype", "threads", "about"} <= state.keys():
            raise InputError(self.unfinished, "not an unfinished run of this program", "run without --resume")
        for key, value in self.about.items():
            was = state["about"].get(key)
            if was != value:
                raise InputError("--resume", f"{key} was {was} and is now {value}", "run with the same settings, or without --resume")
        return state

    def save(self, model, optimizers, **progress):
        state = {"model": model.state_dict(), "optimizers": [o.state_dict() for o in optimizers], **progress}
        with writing(self.unfinished) as file:
            torch.save({**state, "threads": torch.get_num_threads(), "about": self.about}, file)

    def forget(self):
        """Remove what was saved, and what is left of it if the program was killed while it was being written."""
        for path in (self.unfinished, self.unfinished.with_name(self.unfinished.name + ".tmp")):
            path.unlink(missing_ok=True)

    def start_log(self):
        """Begin the log, or keep of it what was logged up to the step that was saved; what came after will be logged again."""
        rows = []
        if self.state:
            n = self.state["step"] // LOG_EVERY
            print(f"Going on from step {self.state['step']}.")
            rows = self.log.read_bytes().splitlines(keepends=True)[:n] if self.log.exists() else []
            if len(rows) < n:
                raise InputError(self.log, f"has lost some of its first {n} rows", "run without --resume")
        elif self.unfinished.exists():
            print("(An unfinished run was here. It is given up, as this one does not --resume it.)")
            self.forget()
        with writing(self.log) as file:
            file.writelines(rows)

    def log_row(self, row):
        try:
            with open(self.log, "a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")
        except OSError as error:
            raise cannot_write(self.log, error) from None
