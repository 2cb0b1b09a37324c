"""
Find and read a base model and its tuned model, and check that they belong together.
"""

from pathlib import Path

from common.checkpoint import read_checkpoint
from common.messages import InputError


def load_pair(out, base_path=None, device="cpu"):
    """Read out/sft.pt and its base model, which is at base_path if that is given.

    Returns two Checkpoints. Raises InputError if one is missing or they don't belong together.
    """
    out = Path(out)
    tuned_path = out / "sft.pt"
    if base_path or (out / "base.pt").exists() or not tuned_path.exists():
        base = read_checkpoint(base_path or out / "base.pt", device)
        tuned = read_checkpoint(tuned_path, device)
    else:
        tuned = read_checkpoint(tuned_path, device)
        base_path = find_base(out, tuned)
        if not base_path.exists():
            what = f"its base model is missing: no {base_path}"
            raise InputError(tuned_path, what, "name the base model with --base")
        base = read_checkpoint(base_path, device)
    check_pair(base, tuned)
    return base, tuned


def find_base(out, tuned):
    """Where we look for the base model without --base: in the folder, then where sft.py read it."""
    recorded = tuned.about.get("base")
    if (out / "base.pt").exists() or not isinstance(recorded, str):
        return out / "base.pt"
    return Path(recorded)


def check_pair(base, tuned):
    """Raise InputError unless tuned was fine-tuned from base."""
    if base.about["stage"] != "base":
        what = "this is a tuned model, but a base model is needed"
        raise InputError(base.path, what, "give --base a file that pretrain.py wrote")
    if tuned.about["stage"] != "sft":
        what = "this is a base model, but a tuned model is needed"
        raise InputError(tuned.path, what, "make one with python sft.py")
    if tuned.about.get("base_sha256") != base.sha256:
        what = f"was tuned from another base model, or {base.path} has changed since"
        raise InputError(tuned.path, what, f"run python sft.py --out {tuned.path.parent} again")
    if tuned.tokenizer.state() != base.tokenizer.state():
        what = f"its vocabulary differs from that of {base.path}"
        raise InputError(tuned.path, what, "run python sft.py again")
    prompts = tuned.about.get("examples") or []
    if not isinstance(prompts, list) or not all(isinstance(p, str) and p.strip() for p in prompts):
        what = "its examples are not a list of prompts"
        raise InputError(tuned.path, what, "run python sft.py again")


def with_control(base, tuned):
    """Both models, and the control (random.pt beside tuned) if it belongs to this base model.

    Returns {"base": base, "tuned": tuned}, perhaps with "random": control, all Checkpoints.
    """
    models = {"base": base, "tuned": tuned}
    path = tuned.path.with_name("random.pt")
    if path.exists():
        control = read_checkpoint(path, base.model.embed.weight.device)
        if control.about.get("base_sha256") == base.sha256:
            check_pair(base, control)
            models["random"] = control
    return models
