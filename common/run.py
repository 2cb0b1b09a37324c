"""
Everything around a training step: which steps to do, logging, progress, saving, stopping with
Ctrl-C, resuming, and adding up what several processes computed.
"""

import dataclasses
import json
import math
import os
import signal
import time
from contextlib import suppress
from pathlib import Path

import torch
import torch.distributed as dist
from torch.nn.utils import parameters_to_vector, vector_to_parameters

from common.checkpoint import Checkpoint, previous_of, read_torch, save
from common.device import precision, processes, say
from common.files import lock, older, refuse_overwriting, remove_leftovers, replace, unlock, writing
from common.messages import InputError, Progress, is_out_of_memory

STARTED = time.perf_counter()
LOG_EVERY = 10  # steps
SAVE_EVERY = 60  # seconds between saves of an unfinished run


class Run:
    """One training run: its current step, its log, and the file that --resume reads."""

    def __init__(self, config, name, made, hashes):
        """name: the log's name, like "pretrain". made: the checkpoint's file name, like "base.pt".

        hashes: a dict, one hash for each input. They must match on --resume, and the checkpoint
        records them. Raises InputError if settings or data changed, or there is no run to resume.
        """
        self.config, self.name, self.out = config, name, Path(config.out)
        self.path = self.out / made
        self.log, self.unfinished = self.out / f"{name}.jsonl", self.out / f"{name}.resume.pt"
        self.rank, self.world_size = processes()
        free = ("out", "resume", "device", "base", "sft")  # these may differ when a run is resumed
        settings = {k: v for k, v in dataclasses.asdict(config).items() if k not in free}
        self.hashes = hashes
        self.about = {**settings, "processes": self.world_size, **hashes}
        self.step, self.tokens, self.seconds = 0, 0, 0.0
        self.rows, self.new = [], {}  # of the log; see claim_files()
        self.state = self.load() if config.resume else None

    def claim_files(self, inputs, outputs, new=None):
        """Check our output files before we write any. inputs: paths; outputs: names in out/.

        new: {path: name}, files that get their names when this run saves or finishes. Until then,
        all files of an earlier run stay as they are. If an older model was made with other settings
        or data, prints a note, and finish() keeps that model under another name. Raises InputError
        if we would overwrite an input, or if another run writes to this folder.
        """
        self.new = new or {}
        outputs = [*(self.out / name for name in outputs), self.path, self.log, self.unfinished]
        refuse_overwriting(inputs, outputs)
        for path in (*outputs, older(self.path)):
            if path.is_dir():
                raise InputError(path, "is a folder, but we write a file here", "move the folder")
        if self.rank == 0:
            lock(self.out)
            remove_leftovers([*outputs, *self.new])
            self.keep = previous_of(self.path, self.about)
            for name in filter(Path.exists, self.new.values()):
                say(f"There is already a file {name}. This run will keep it as {older(name)}.")

    # What the training loop calls

    def steps(self, model, optimizers):
        """Yield the number of each step that is left to do, from 0 or from where a run stopped."""
        self.model, self.optimizers, self.device = model, optimizers, model.embed.weight.device
        self.dtype = precision(self.device)
        self.earlier = not self.state and self.unfinished.exists()  # a run that was stopped
        if self.state:
            try:
                self.restore(self.state)
            except Exception as error:  # a damaged or edited file may hold anything
                if is_out_of_memory(error):
                    raise
                raise self.does_not_fit() from None
            self.state = None  # free its memory
            say(f"Resuming from step {self.step}.")
        elif self.earlier:
            say("An unfinished run is here. It stays until this one saves; --resume continues it.")
        self.progress = Progress(self.name, self.config.max_steps, self.step)
        self.saved_at = time.perf_counter()
        self.start_interval()
        with CtrlC() as self.ctrl_c:
            while self.step < self.config.max_steps:
                # The dropout seed depends only on the step, so a resumed run matches exactly.
                seed = (self.config.seed * 1_000_003 + self.step) * 1009 + self.rank
                torch.manual_seed(seed % 2**63)
                yield self.step

    def autocast(self):
        """Multiply matrices in bfloat16 where the hardware is fast at it."""
        return torch.autocast(
            self.device.type, torch.bfloat16, enabled=self.dtype == torch.bfloat16
        )

    def all_reduce(self, loss_sum, count):
        """All-reduce the gradients, losses and counts. Returns (loss_sum, count)."""
        if self.world_size == 1:
            return loss_sum, count
        trained = [p for p in self.model.parameters() if p.requires_grad]
        for p in trained:
            if p.grad is None:  # this process had no rows
                p.grad = torch.zeros_like(p)
        sums = [torch.tensor(float(x), device=self.device) for x in (loss_sum, count)]
        sums += [p.grad for p in trained]
        vector = parameters_to_vector(sums)
        dist.all_reduce(vector)
        vector_to_parameters(vector, sums)
        return sums[0], int(sums[1])

    def end_step(self, loss, batch, evaluate):
        """Count the step. Every LOG_EVERY steps, and at the end: log, show, save, stop if asked.

        loss: of the whole step, a tensor or a number. evaluate: see train().
        """
        self.step += 1
        self.tokens += batch["input_ids"].numel()
        self.losses.append(loss)
        last = self.step == self.config.max_steps
        if self.step % LOG_EVERY and not last:
            return
        losses = [float(loss) for loss in self.losses]  # on a GPU, this waits for the steps
        self.check_finite(losses)
        stop = self.any_process(self.ctrl_c.pressed) and not last
        if self.rank == 0:
            row = self.make_row(losses)
            if evaluate and (last or self.is_due(self.config.eval_every)):
                row.update(evaluate(self.model))
            self.rows.append(row)
            due = time.perf_counter() - self.saved_at > SAVE_EVERY
            if not last and (due or (stop and not self.earlier)):
                self.save()
            text = f"loss {row['loss']:.3f}  {row['tokens_per_s']:,} tokens/s"
            self.progress.update(self.step, text)
        if stop:
            if self.world_size > 1:
                dist.barrier()  # wait until the first process has saved
            if self.earlier:
                say("\nStopped. This run is not saved: the earlier unfinished run is still there.")
            else:
                say(f"\nStopped at step {self.step}. Add --resume to the command to continue.")
            raise KeyboardInterrupt("told")
        self.start_interval()

    def finish(self, tokenizer, also=lambda: None, **about):
        """Write the checkpoint and the log, and remove what was saved for --resume.

        also(): writes what else belongs to the model. Returns a Checkpoint.
        """
        about = {**about, **self.hashes, "seed": self.config.seed, "settings": self.about}
        checkpoint = Checkpoint(self.path, self.model, tokenizer, about)
        with self.ctrl_c:
            save(checkpoint, self.keep)
            also()
            self.adopt()
            self.write_log()
            self.unfinished.unlink(missing_ok=True)
            unlock(self.out)
        if self.ctrl_c.pressed:  # in the last steps: the model is complete, so just stop
            print(f"\nFinished: the model is in {self.path}.")
            raise KeyboardInterrupt("told")
        return checkpoint

    # The log

    @property
    def row(self):
        """The last row, or {} in all processes but the first."""
        return self.rows[-1] if self.rows else {}

    def elapsed(self):
        """Seconds that the run has taken so far, including those before a resume."""
        return self.seconds + time.perf_counter() - STARTED

    def start_interval(self):
        self.losses, self.since, self.tokens_before = [], time.perf_counter(), self.tokens

    def make_row(self, losses):
        now = time.perf_counter()
        return {
            "step": self.step,
            "tokens": self.tokens,
            "seconds": round(self.elapsed(), 3),
            "loss": sum(losses) / len(losses),
            "lr": self.optimizers[0].param_groups[0]["lr"],
            "tokens_per_s": round((self.tokens - self.tokens_before) / (now - self.since)),
        }

    def is_due(self, every):
        """Whether a multiple of `every` lies within the steps since the last row."""
        return self.step // every > (self.step - len(self.losses)) // every

    def any_process(self, flag):
        """Whether the flag is set in any process. Ctrl-C may reach them at different steps."""
        if self.world_size == 1:
            return flag
        flags = torch.tensor(float(flag), device=self.device)
        dist.all_reduce(flags)
        return bool(flags)

    def check_finite(self, losses):
        """Raise InputError if a loss or a weight is NaN or infinite, before anything is saved."""
        where, what = self.step, None
        if not all(p.isfinite().all() for p in self.model.parameters()):
            what = "a weight is NaN or infinite"
        for i, loss in enumerate(losses):
            if not math.isfinite(loss):
                where, what = self.step - len(losses) + 1 + i, f"the loss is {loss}"
                break
        if what:
            raise InputError(f"step {where}", what, "lower --lr and --embed_lr")

    def write_log(self):
        with writing(self.log, "w") as file:
            file.writelines(json.dumps(row) + "\n" for row in self.rows)

    # Saving and resuming

    def save(self):
        state = {
            "model": self.model.state_dict(),
            "optimizers": [optimizer.state_dict()["state"] for optimizer in self.optimizers],
            "rows": self.rows,
            "dtype": self.dtype,
            "threads": torch.get_num_threads(),
            "about": self.about,
        }
        with writing(self.unfinished) as file:
            torch.save(state, file)  # flushes: a full disk shows here, before a file moves
            self.adopt()
        self.write_log()
        self.saved_at, self.earlier = time.perf_counter(), False

    def adopt(self):
        """Give the new files their names. An earlier one of that name is kept under another."""
        for path, name in self.new.items():
            if path.exists():
                replace(path, name, older(name))

    def load(self):
        if not self.unfinished.is_file():
            what = f"there is no unfinished run ({self.unfinished})"
            raise InputError(
                "--resume", what, "start one without --resume, or use the finished model"
            )
        state = read_torch(self.unfinished.read_bytes(), self.unfinished)
        parts = {"model", "optimizers", "rows", "dtype", "threads", "about"}
        if not isinstance(state, dict) or state.keys() != parts:
            what = "not an unfinished run of this program"
            raise InputError(self.unfinished, what, "run without --resume")
        if not isinstance(state["about"], dict):
            raise self.does_not_fit()
        for key, value in self.about.items():
            before = state["about"].get(key)
            if type(before) is not type(value) or before != value:
                what = f"{key} was {before} and is now {value}"
                raise InputError("--resume", what, "use the same settings and data, or no --resume")
        return state

    def does_not_fit(self):
        todo = "start over without --resume"
        return InputError(self.unfinished, "its parts do not fit together", todo)

    def restore(self, state):
        """Continue from a saved state. May raise anything if it is not what save() writes."""
        if not all(self.parts_fit(state)):
            raise ValueError
        row, threads = state["rows"][-1], state["threads"]
        self.rows, self.dtype = state["rows"], state["dtype"]
        self.step, self.tokens, self.seconds = row["step"], row["tokens"], row["seconds"]
        self.model.load_state_dict(state["model"])
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            settings = optimizer.state_dict()["param_groups"]
            optimizer.load_state_dict({"state": saved, "param_groups": settings})
        torch.set_num_threads(threads)  # more or fewer would round sums differently

    def parts_fit(self, state):
        """Yield bools: whether each part of a state is what save() writes. May raise anything."""
        row = state["rows"][-1]
        yield type(state["rows"]) is list
        yield all(isinstance(v, int | float) for row in state["rows"] for v in row.values())
        json.dumps(state["rows"])
        yield all(type(row[key]) is int and row[key] > 0 for key in ("step", "tokens"))
        yield type(row["seconds"]) is float and 0 <= row["seconds"] < math.inf
        yield row["step"] < self.config.max_steps
        yield type(state["threads"]) is int and 0 < state["threads"] <= 1024
        yield state["dtype"] in (torch.float32, torch.bfloat16)
        yield shapes(state["model"]) == shapes(self.model.state_dict())
        yield all(p.isfinite().all() for p in state["model"].values())
        kinds = {"momentum"}, {"step", "exp_avg", "exp_avg_sq"}  # of Muon, of AdamW
        for optimizer, saved, keys in zip(self.optimizers, state["optimizers"], kinds, strict=True):
            weights = [p for group in optimizer.param_groups for p in group["params"]]
            yield saved.keys() == {i for i, p in enumerate(weights) if p.requires_grad}
            for i, kept in saved.items():
                like = {k: torch.zeros(()) if k == "step" else weights[i] for k in keys}
                yield shapes(kept) == shapes(like)
                yield all(p.isfinite().all() for p in kept.values())


def shapes(weights):
    return {name: (p.shape, p.dtype, p.is_contiguous()) for name, p in weights.items()}


class CtrlC:
    """Inside this context, the first Ctrl-C only sets .pressed. The second one stops at once."""

    pressed = False

    def __enter__(self):
        self.before = signal.signal(signal.SIGINT, self.note)
        return self

    def note(self, *_):
        self.pressed = True
        one_process = not dist.is_initialized()
        if one_process:  # torchrun repeats a Ctrl-C to processes that have already seen it
            signal.signal(signal.SIGINT, self.before)
        if processes()[0] == 0:
            second = " (A second Ctrl-C stops at once, without saving.)" if one_process else ""
            text = f"\nStopping within {LOG_EVERY} steps.{second}\n"
            with suppress(OSError):  # nobody may be reading any more
                os.write(2, text.encode())  # print would fail if the signal came during a print

    def __exit__(self, *_):
        signal.signal(signal.SIGINT, self.before)
