"""
Find and read the models of all stages, and check that they belong together.
"""

from pathlib import Path

from common.checkpoint import read_checkpoint, world_of
from common.messages import InputError


def load_stages(out, base_path=None, device="cpu", stage=None):
    """Read the models in a folder: {"base", "tuned", "dpo"}, all Checkpoints.

    "dpo" is missing if there is no dpo.pt, if it was made from another sft.pt, or if stage is
    "sft". base_path: the base model, if it moved. If a model is missing, we look where the next
    stage read it. Raises InputError if we can't find it, or if they don't belong together.
    """
    tuned_path, dpo_path, preferred = Path(out) / "sft.pt", Path(out) / "dpo.pt", None
    if dpo_path.exists() and stage != "sft":
        preferred = read_checkpoint(dpo_path, device)
        if preferred.about["stage"] != "dpo":
            raise InputError(dpo_path, "was not made by dpo.py", "move it, or run python dpo.py")
        if not tuned_path.exists():
            tuned_path = Path(str(preferred.about.get("sft")))
            if not tuned_path.exists():
                what = f"its tuned model is missing: no {tuned_path}"
                raise InputError(dpo_path, what, "put sft.pt beside it")
    folder = tuned_path.parent
    if base_path or (folder / "base.pt").exists() or not tuned_path.exists():
        base = read_checkpoint(base_path or folder / "base.pt", device)
        tuned = read_checkpoint(tuned_path, device)
    else:
        tuned = read_checkpoint(tuned_path, device)
        base_path = find_base(tuned)
        if not base_path.exists():
            what = f"its base model is missing: no {base_path}"
            raise InputError(tuned_path, what, "name the base model with --base")
        base = read_checkpoint(base_path, device)
    check_pair(base, tuned)
    models = {"base": base, "tuned": tuned}
    if preferred and preferred.about.get("sft_sha256") == tuned.sha256:
        check_pair(base, preferred)
        models["dpo"] = preferred
    elif preferred:
        print(f"We leave out {dpo_path}: it was not made from {tuned_path}.")
    if stage == "dpo" and "dpo" not in models:
        what = f"{out} has no dpo.pt made from its sft.pt"
        raise InputError("--stage", what, "run python dpo.py")
    return models


def find_base(tuned):
    """Where we look for the base model without --base: beside it, then where sft.py read it."""
    beside, recorded = tuned.path.with_name("base.pt"), tuned.about.get("base")
    return beside if beside.exists() or not isinstance(recorded, str) else Path(recorded)


def check_pair(base, tuned):
    """Raise InputError unless tuned was fine-tuned from base, perhaps in two stages."""
    if base.about["stage"] != "base":
        what = "this is a tuned model, but a base model is needed"
        raise InputError(base.path, what, "give --base a file that pretrain.py wrote")
    if tuned.about["stage"] == "base":
        what = "this is a base model, but a tuned model is needed"
        raise InputError(tuned.path, what, "make one with python sft.py")
    if tuned.about.get("base_sha256") != base.sha256:
        what = f"was tuned from another base model, or {base.path} has changed since"
        raise InputError(tuned.path, what, f"run python sft.py --out {tuned.path.parent} again")
    if tuned.tokenizer.state() != base.tokenizer.state():
        what = f"its vocabulary differs from that of {base.path}"
        raise InputError(tuned.path, what, "run python sft.py again")
    prompts = tuned.about.get("examples")
    prompts = [] if prompts is None else prompts
    if not isinstance(prompts, list) or not all(isinstance(p, str) and p.strip() for p in prompts):
        what = "its examples are not a list of prompts"
        raise InputError(tuned.path, what, "run python sft.py again")


def read_stage(stage, path, device):
    """Read the model of a stage, "base" or "sft". Raises InputError if it is another one's."""
    checkpoint = read_checkpoint(path, device)
    if (found := checkpoint.about["stage"]) != stage:
        made = {"base": "base model, made by pretrain.py", "sft": "tuned model, made by sft.py"}
        what = f"this is a checkpoint of stage {found!r}"
        raise InputError(checkpoint.path, what, f"name a {made[stage]}")
    return checkpoint


def world_behind(tuned):
    """The folder of the embedded world that a tuned model's base model has read.

    Raises InputError if there is none, or if the base model is missing or has changed.
    """
    if not (path := find_base(tuned)).exists():
        todo = f"put base.pt beside {tuned.path}, or give your own pairs: --data FILE"
        raise InputError(tuned.path, f"its base model is missing: no {path}", todo)
    base = read_checkpoint(path)
    check_pair(base, tuned)
    if not (folder := world_of(base)):
        what = "there is no embedded world beside the base model"
        raise InputError("command line", what, "give your own pairs: --data FILE")
    return folder


def with_control(models):
    """The models, and the control (random.pt beside the tuned one) if it has the same base model.

    models: {"base", "tuned"} and perhaps "dpo". The control is called "random".
    """
    base, tuned = models["base"], models["tuned"]
    path = tuned.path.with_name("random.pt")
    if path.exists():
        control = read_checkpoint(path, base.model.embed.weight.device)
        if control.about.get("base_sha256") == base.sha256:
            check_pair(base, control)
            return {**models, "random": control}
    return models
