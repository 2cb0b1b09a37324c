"""
Checkpoints: one file with everything that is needed to use a model.

A checkpoint is data. Loading it runs no code, so it is safe to open one from a stranger.
"""

import dataclasses
import hashlib
import io
import warnings
import zipfile
from dataclasses import dataclass
from pathlib import Path

import regex  # comes with tiktoken
import torch

from common.files import check_file, is_too_deep, older, writing
from common.messages import InputError, is_out_of_memory, readable
from data.tokenizer import Tokenizer
from data.world import read_questions, read_smalltalk
from model import GPT, GPTConfig

FORMAT = "parrot checkpoint 1"
LONGEST_BLOCK = 10**6  # positions, as many as pretrain.py allows; each one needs memory
LARGEST_BLOCK = 250 * 10**6  # positions times their width in a head: 1 GB of cosines and sines


@dataclass
class Checkpoint:
    """A model in memory, and where it came from."""

    path: Path
    model: GPT
    tokenizer: Tokenizer
    about: dict  # "stage", "trained_on", "seed", "settings", ...
    sha256: str = ""  # of the file, if it was read from one


def save(checkpoint, keep=None):
    """Write a checkpoint to its path. keep: see writing()."""
    model = checkpoint.model
    weights = {name: p.detach().cpu() for name, p in model.state_dict().items()}
    weights["head.weight"] = weights["embed.weight"]  # the same table: store it once
    state = {
        "format": FORMAT,
        "config": dataclasses.asdict(model.config),
        "weights": weights,
        "tokenizer": checkpoint.tokenizer.state(),
        **checkpoint.about,
    }
    with writing(checkpoint.path, keep=keep) as file:
        torch.save(state, file)


def read_torch(content, path):
    """torch.load for data only: nothing in the file is executed. content: the bytes of path."""
    try:
        with zipfile.ZipFile(io.BytesIO(content)) as parts, warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of odd kinds of numbers
            packed = any(part.compress_type for part in parts.infolist())
            if packed or parts.testzip():  # torch.load doesn't look at the checksums
                raise ValueError
            state = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
        if is_too_deep(state):
            raise ValueError
        return state
    except Exception as error:  # damaged files make the unpickler raise almost anything
        what = f"not a readable checkpoint ({type(error).__name__})"
        raise InputError(path, what, "rerun the command that made it") from None


def read_checkpoint(path, device="cpu"):
    """Read a checkpoint of any stage, once. Returns a Checkpoint.

    Raises InputError if the file is missing, damaged, or not one of ours.
    """
    path = Path(path)
    if not path.exists():
        stage = "sft.py" if path.name == "sft.pt" else "pretrain.py"
        out = "" if path.parent == Path("out") else f" --out {path.parent}"
        todo = f"make it with python {stage}{out}, or name another folder or file"
        raise InputError(path, "no such checkpoint", todo)
    check_file(path)
    content = path.read_bytes()
    state = read_torch(content, path)
    ours = isinstance(state, dict) and state.get("format") == FORMAT
    if not (ours and "stage" in state and isinstance(state.get("trained_on"), dict)):
        raise InputError(path, f'not a checkpoint of this program ("{FORMAT}")', "train it again")
    try:
        model, tokenizer = rebuild(state, len(content))
    except BaseException as error:  # a panic of the tokenizer's library is no Exception
        if isinstance(error, KeyboardInterrupt) or is_out_of_memory(error):
            raise
        why = f"{type(error).__name__}: {error}".splitlines()[0]
        raise InputError(path, f"its parts do not fit together ({why})", "train it again") from None
    parts = ("format", "config", "weights", "tokenizer")
    about = {key: value for key, value in state.items() if key not in parts}
    sha256 = hashlib.sha256(content).hexdigest()
    return Checkpoint(path, model.to(device).eval(), tokenizer, about, sha256)


def read_tokenizer(state):
    """The tokenizer with this state(). Raises ValueError if it could not encode every text."""
    merges, pattern = [token.encode("latin-1") for token in state["merges"]], state["pattern"]
    if len(set(merges)) < len(merges) or not {bytes([b]) for b in range(256)} <= set(merges):
        raise ValueError("a token occurs twice, or a byte has none")
    probe = "".join(map(chr, range(1, 127))) + " a word, 42 more.\n\n 앵무새 \u200b🦜"
    found = [match[0] for match in regex.finditer(pattern, probe, timeout=1)]
    if "".join(found) != probe or "" in found:  # tiktoken would lose text, or crash
        raise ValueError("its pattern does not cut every text into words")
    return Tokenizer.from_state(state)


def rebuild(state, size):
    """The network and the tokenizer from what save() wrote. Raises if parts do not fit.

    size: of the file, in bytes.
    """
    config, weights = state["config"], state["weights"]
    if sum(p.nbytes for name, p in weights.items() if name != "head.weight") > size:
        raise ValueError("the weights are larger than the file")  # it repeats one number
    if config.keys() != {field.name for field in dataclasses.fields(GPTConfig)}:
        raise ValueError(f"unexpected config: {', '.join(config)}")
    whole = [type(size) is int for key, size in config.items() if key != "dropout"]
    if not all(whole) or type(config["dropout"]) not in (int, float):
        raise ValueError("sizes must be whole numbers, and dropout a number")
    if config["n_layer"] > len(weights) or config["block_size"] > LONGEST_BLOCK:
        raise ValueError("a size is too large")
    if config["block_size"] * config["n_embd"] // config["n_head"] > LARGEST_BLOCK:
        raise ValueError("a size is too large")
    tokenizer = read_tokenizer(state["tokenizer"])
    if tokenizer.n_vocab != config["vocab_size"]:
        raise ValueError(f"{tokenizer.n_vocab} tokens, but vocab_size is {config['vocab_size']}")
    with torch.device("meta"):  # takes no memory, so wrong sizes do no harm
        model = GPT(GPTConfig(**config))
        expected = {name: p.shape for name, p in model.state_dict().items()}
    if expected != {name: p.shape for name, p in weights.items()}:
        raise ValueError("the weights don't have the shapes that the config asks for")
    model = GPT(GPTConfig(**config))
    model.load_state_dict(weights)
    if not all(p.isfinite().all() for p in model.parameters()):
        raise ValueError("a weight is NaN or infinite")
    return model, tokenizer


def load(path, device="cpu"):
    """The (model, tokenizer) of a checkpoint, the model on the device and in eval mode."""
    checkpoint = read_checkpoint(path, device)
    return checkpoint.model, checkpoint.tokenizer


def world_of(base):
    """The folder of the embedded world that a base model was trained on.

    base: a Checkpoint. Returns None if the model read other text, or if the folder is gone. Raises
    InputError if the folder belongs to another run, or if a file of questions in it is broken.
    """
    folder = base.path.with_name("world")
    if "world" not in base.about["trained_on"] or not folder.exists():
        return None
    stamp = folder / "sha256"
    fingerprint = str(base.about.get("text_sha256")).encode()
    if not stamp.is_file() or stamp.read_bytes().split(b" ")[0] != fingerprint:
        todo = f"run python pretrain.py --out {folder.parent} --seed {base.about.get('seed')} again"
        raise InputError(folder, f"does not belong to {base.path}", todo)
    for side in ("train", "dev", "test"):  # before we train, not when we ask them afterwards
        read_questions(folder / f"{side}.jsonl")
    read_smalltalk(folder / "smalltalk.jsonl")
    return folder


def previous_of(path, settings):
    """Where to keep a finished model that a run with these settings would replace, or None.

    Prints a note if the model at path was made with other settings or data.
    """
    if not path.is_file():
        return None
    try:
        before = read_torch(path.read_bytes(), path)["settings"]
        changed = {key for key in settings if before.get(key) != settings[key]}
    except Exception:  # not one of ours, or damaged: keep it all the same
        before, changed = {}, {"everything"}
    if not changed:
        return None
    shown = [
        f"{key} {before[key]}"
        for key in sorted(changed)
        if key in before and len(str(before[key])) < 20
    ]
    made = f" (made with {', '.join(shown[:4])})" if shown else ""
    keep = older(path)
    print(readable(f"There is already a model in {path}{made}. This run will keep it as {keep}."))
    return keep
