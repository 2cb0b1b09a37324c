"""Command-line options and their bounds, one-line errors, and the progress line."""

import os
import sys
from dataclasses import dataclass

import pytest

from common import messages
from common.messages import InputError, Progress, command
from common.options import Parser, not_empty, parse_options, setting


@dataclass
class Config:
    out: str = setting("out", "where to write", metavar="FOLDER")
    n_layer: int = setting(4, "blocks")
    max_steps: int = setting(700, "steps")
    seed: int = setting(1, "random seed", least=0, most=2**62)
    warmup: float = setting(0.02, "share of the steps", most=1)
    dropout: float = setting(0.0, "share of activations", below=1)
    lr: float = setting(0.01, "learning rate")
    resume: bool = setting(False, "continue a run")


def parse(*argv, preset=lambda args: {}):
    return parse_options(Parser("p"), Config, argv, preset)[0]


OUT_OF_RANGE = [
    ("--warmup", "100", "100.0 is out of range; give a number from 0 to 1"),
    ("--warmup", "-0.1", "-0.1 is out of range; give a number from 0 to 1"),
    ("--warmup", "nan", "nan is out of range; give a number from 0 to 1"),
    ("--dropout", "1", "1.0 is out of range; give a number from 0 to just below 1"),
    ("--dropout", "nan", "nan is out of range"),
    ("--lr", "inf", "inf is out of range; give a number from 0 to 1000000"),
    ("--lr", "1e300", "1e+300 is out of range"),
    ("--seed", "-1", "-1 is out of range; give a whole number from 0 to"),
    ("--n_layer", "0", "0 is out of range; give a whole number from 1"),
    ("--n_layer", "9" * 30, "9" * 30 + " is out of range"),
]


@pytest.mark.parametrize("option, value, complaint", OUT_OF_RANGE)
def test_a_number_out_of_its_bounds(option, value, complaint):
    with pytest.raises(InputError) as error:
        parse(option, value)
    assert str(error.value).startswith(f"{option}: {complaint}")


def test_numbers_at_their_bounds():
    config = parse("--warmup", "1", "--dropout", "0.999", "--seed", "0", "--lr", "0")
    assert (config.warmup, config.dropout, config.seed, config.lr) == (1, 0.999, 0, 0)


def test_a_preset_is_checked_too():
    with pytest.raises(InputError, match="--n_layer: 0 is out of range"):
        parse(preset=lambda args: {"n_layer": 0})
    assert parse("--n_layer", "2", preset=lambda args: {"n_layer": 0}).n_layer == 2


@pytest.mark.parametrize("argv", [["--max_step", "10"], ["--res"], ["--n", "2"]])
def test_only_exact_names(argv):
    with pytest.raises(InputError, match=f"unrecognized arguments: {argv[0]}"):
        parse(*argv)


@pytest.mark.parametrize("value", ["", "a\0b"])
def test_a_name_that_cannot_be(value):
    parser = Parser("p")
    parser.add_argument("--data", type=not_empty)
    for option in ("--data", "--out"):
        with pytest.raises(InputError, match=f"argument {option}: must not"):
            parse_options(parser, Config, [option, value])
        parser = Parser("p")


def test_help(capsys):
    with pytest.raises(SystemExit):
        parse("--help")
    shown = capsys.readouterr().out
    assert "--out FOLDER" in shown and "where to write (default: out)" in shown
    assert "--n_layer N" in shown and "--resume, --no-resume" in shown


# Messages


@pytest.mark.parametrize(
    "error, complaint",
    [
        (MemoryError(), "error: memory: out of memory; set --micro_batch_size"),
        (RuntimeError("CUDA out of memory."), "error: memory: out of memory; set --micro"),
        (OSError("odd"), "error: files: odd; check the path"),
        (InputError("a\nb", "c\x1b", "d"), "error: a b: c?; d\n"),
    ],
)
def test_errors_are_one_line(error, complaint, capsys):
    @command
    def main(argv=None):
        raise error

    with pytest.raises(SystemExit) as stopped:
        main([])
    shown = capsys.readouterr().err
    assert stopped.value.code == 2 and shown.startswith(complaint) and shown.count("\n") == 1


@pytest.mark.parametrize(
    "error", [RecursionError("ours"), RuntimeError("ours"), ValueError("ours")]
)
def test_programming_errors_keep_their_traceback(error):
    @command
    def main(argv=None):
        raise error

    with pytest.raises(type(error), match="ours"):
        main([])


# The progress line


class Clock:
    """A clock that moves only when told to."""

    def __init__(self, monkeypatch):
        self.now = 1000.0
        monkeypatch.setattr(messages.time, "perf_counter", lambda: self.now)

    def lines(self, progress, seconds, rate, start, capsys, text=""):
        """Let time pass, with an update every second. Returns how many are done, and the lines."""
        for _ in range(seconds):
            self.now += 1
            start += rate
            progress.update(start, text)
        return start, capsys.readouterr().err.splitlines()


def test_the_time_left_forgets_a_slow_stretch(monkeypatch, capsys):
    clock = Clock(monkeypatch)
    progress = Progress("pretrain", 2000)
    done, _ = clock.lines(progress, 60, 1, 0, capsys)  # slow: 1 per second
    done, lines = clock.lines(progress, 30, 10, done, capsys)  # then 10 per second
    left = (2000 - done) / 10
    shown = [part for part in lines[-1].split("  ") if part.endswith(" left")][0]
    minutes, seconds = shown.removesuffix(" left").split(":")
    assert left <= 60 * int(minutes) + int(seconds) <= left + 12  # printed up to 10 s ago


def test_the_rate_is_of_the_recent_past(monkeypatch, capsys):
    clock = Clock(monkeypatch)
    progress = Progress("reading, MB:", 10_000, unit="MB")
    done, _ = clock.lines(progress, 60, 1, 0, capsys)
    _, lines = clock.lines(progress, 30, 40, done, capsys)
    assert lines[-1].endswith("40 MB/s")
    progress = Progress("encoding:", 100, unit="million")
    for done in range(1, 8):
        clock.now += 2
        progress.update(done)
    assert capsys.readouterr().err.endswith("0.5 million/s\n")


def test_a_file_gets_a_line_early_and_then_every_ten_seconds(monkeypatch, capsys):
    clock = Clock(monkeypatch)
    progress = Progress("pretrain", 100)
    shown = []
    for second in range(1, 26):
        _, lines = clock.lines(progress, 1, 1, second - 1, capsys)
        shown += [second] * len(lines)
    assert shown == [2, 12, 22]
    assert clock.lines(progress, 75, 1, 25, capsys)[1][-1].split("  ")[0].endswith("100/100")


def test_short_work_shows_nothing_in_a_file(monkeypatch, capsys):
    clock = Clock(monkeypatch)
    clock.now += 0.5
    Progress("short", 3).update(3)
    Progress("nothing", 0).update(0)
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("columns", [200, 80, 60, 40, 30])
def test_a_narrow_terminal_still_shows_what_matters(columns, monkeypatch, capsys):
    clock = Clock(monkeypatch)
    size = os.terminal_size((columns, 24))
    monkeypatch.setattr(messages.shutil, "get_terminal_size", lambda *default: size)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    progress = Progress("encoding, million characters:", 10_000)
    _, lines = clock.lines(progress, 9, 2, 1234, capsys, "loss 2.345  123,456 tokens/s")
    last = lines[-1].split("\r")[-1]
    assert "1,252/10,000" in last and " left" in last and len(last) == columns - 1


def test_the_usual_line_fits_a_terminal_of_80_columns(monkeypatch, capsys):
    clock = Clock(monkeypatch)
    progress = Progress("pretrain", 10_000)
    clock.now += 10
    progress.updates.append((clock.now, 4_000))
    line = progress.line(4_000, "loss 2.345  123,456 tokens/s", 79)
    assert line == "pretrain [####......] 4,000/10,000  0:15 left  loss 2.345  123,456 tokens/s"
