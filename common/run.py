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
from pathlib import Path

import torch
import torch.distributed as dist
from torch.nn.utils import parameters_to_vector, vector_to_parameters

from common.checkpoint import Checkpoint, previous_of, read_torch, save
from common.device import precision, processes
from common.files import cannot_write, refuse_overwriting, writing
from common.messages import InputError, Progress

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
        self.step, self.tokens, self.seconds, self.row = 0, 0, 0.0, {}
        self.state = self.load() if config.resume else None

    def claim_files(self, inputs, outputs):
        """Check our output files before we write any. inputs: paths; outputs: names in out/.

        Raises InputError if we would overwrite an input. If an older model was made with other
        settings or data, prints a note, and finish() keeps that model under another name.
        """
        outputs = [*(self.out / name for name in outputs), self.path, self.log, self.unfinished]
        refuse_overwriting(inputs, outputs)
        for path in outputs:
            if path.is_dir():
                raise InputError(path, "is a folder, but we write a file here", "move the folder")
        self.previous = previous_of(self.path, self.about) if self.rank == 0 else None

    # What the training loop calls

    def steps(self, model, optimizers):
        """Yield the number of each step that is left to do, from 0 or from where a run stopped."""
        self.model, self.optimizers, self.device = model, optimizers, model.embed.weight.device
        self.dtype = precision(self.device)
        if self.state:
            try:
                self.restore(self.state)
            except (RuntimeError, ValueError, TypeError, KeyError, AttributeError):
                what = "its parts do not fit together"
                raise InputError(self.unfinished, what, "start over without --resume") from None
        if self.rank == 0:
            self.start_log()
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
            self.row = self.make_row(losses)
            if evaluate and (last or self.is_due(self.config.eval_every)):
                self.row.update(evaluate(self.model))
            self.write_row()
            text = f"loss {self.row['loss']:.3f}  {self.row['tokens_per_s']:,} tokens/s"
            self.progress.update(self.step, text)
            if stop or (not last and time.perf_counter() - self.saved_at > SAVE_EVERY):
                self.save()
        if stop:
            if self.world_size > 1:
                dist.barrier()  # wait until the first process has saved
            if self.rank == 0:
                print(f"\nStopped at step {self.step}. Add --resume to the command to continue.")
            raise KeyboardInterrupt("saved")
        self.start_interval()

    def finish(self, tokenizer, **about):
        """Write the checkpoint, and remove what was saved for --resume. Returns a Checkpoint."""
        about = {**about, **self.hashes, "seed": self.config.seed, "settings": self.about}
        checkpoint = Checkpoint(self.path, self.model, tokenizer, about)
        save(checkpoint, self.previous)
        self.forget()
        if self.ctrl_c.pressed:  # in the last steps: the model is complete, so just stop
            print(f"\nFinished: the model is in {self.path}.")
            raise KeyboardInterrupt("saved")
        return checkpoint

    # The log

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

    def start_log(self):
        """Start the log, or cut it back to the saved step: the run writes later rows again."""
        rows = []
        if self.state:
            n = self.step // LOG_EVERY
            print(f"Resuming from step {self.step}.")
            if self.log.exists():
                rows = self.log.read_bytes().splitlines(keepends=True)[:n]
            if len(rows) < n:
                what = f"some of its first {n} rows are missing"
                raise InputError(self.log, what, "start over without --resume")
        elif self.unfinished.exists():
            print("Discarding an unfinished run (use --resume to continue it).")
            self.forget()
        with writing(self.log) as file:
            file.writelines(rows)

    def write_row(self):
        try:
            with open(self.log, "a", encoding="utf-8") as file:
                file.write(json.dumps(self.row) + "\n")
        except OSError as error:
            raise cannot_write(self.log, error) from None

    # Saving and resuming

    def save(self):
        state = {
            "model": self.model.state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
            "step": self.step,
            "tokens": self.tokens,
            "seconds": self.row["seconds"],
            "dtype": self.dtype,
            "threads": torch.get_num_threads(),
            "about": self.about,
        }
        with writing(self.unfinished) as file:
            torch.save(state, file)
        self.saved_at = time.perf_counter()

    def load(self):
        if not self.unfinished.is_file():
            what = f"there is no unfinished run ({self.unfinished})"
            raise InputError(
                "--resume", what, "start one without --resume, or use the finished model"
            )
        state = read_torch(self.unfinished.read_bytes(), self.unfinished)
        parts = {"model", "optimizers", "step", "tokens", "seconds", "dtype", "threads", "about"}
        if not isinstance(state, dict) or not parts <= state.keys():
            what = "not an unfinished run of this program"
            raise InputError(self.unfinished, what, "run without --resume")
        if not isinstance(state["about"], dict):
            raise InputError(
                self.unfinished, "its parts do not fit together", "start over without --resume"
            )
        for key, value in self.about.items():
            before = state["about"].get(key)
            if before != value:
                what = f"{key} was {before} and is now {value}"
                raise InputError("--resume", what, "use the same settings and data, or no --resume")
        return state

    def restore(self, state):
        self.model.load_state_dict(state["model"])
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        counts = state["step"], state["tokens"], state["seconds"]
        if any(type(n) not in (int, float) or n < 0 for n in counts):
            raise ValueError("a count is not a number")
        self.step, self.tokens, self.seconds = counts
        self.dtype = state["dtype"]
        torch.set_num_threads(state["threads"])  # more or fewer would round sums differently

    def forget(self):
        """Remove the saved state, and the temporary file that a killed save may have left."""
        for path in (self.unfinished, self.unfinished.with_name(self.unfinished.name + ".tmp")):
            path.unlink(missing_ok=True)


class CtrlC:
    """Inside this context, the first Ctrl-C only sets .pressed. The second one stops at once."""

    def __enter__(self):
        self.pressed, self.before = False, signal.signal(signal.SIGINT, self.note)
        return self

    def note(self, *_):
        self.pressed = True
        one_process = not dist.is_initialized()
        if processes()[0] == 0:
            second = " (A second Ctrl-C stops at once, without saving.)" if one_process else ""
            text = f"\nSaving, then stopping, within {LOG_EVERY} steps.{second}\n"
            os.write(2, text.encode())  # print would fail if the signal came during a print
        if one_process:  # torchrun repeats a Ctrl-C to processes that have already seen it
            signal.signal(signal.SIGINT, self.before)

    def __exit__(self, *_):
        signal.signal(signal.SIGINT, self.before)
