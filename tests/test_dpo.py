"""Stage 3: pairs of answers, and how compare.py shows the model that dpo.py makes."""

import json
import shutil
import sys
from unittest.mock import Mock

import pytest
import torch

import common.run
import compare
import dpo
from common import scores
from common.checkpoint import read_checkpoint
from common.completion import respond
from common.files import read_json
from common.report import show_pairs
from common.stages import load_stages
from data import Tokenizer, world
from data.world import tables
from data.world.scorer import Scorer
from dpo import dpo_data_collator, encode_pair
from model import GPTConfig
from test_interruption import FileSizeLimit

PAIR = {"prompt": "Kenya?", "chosen": "The capital is Nairobi.", "rejected": "Lima."}


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.train(["What is the capital of Kenya? The capital is Nairobi. " * 10], 280)


def message(role, content):
    return {"role": role, "content": content}


@pytest.fixture(scope="module")
def third_stage(small_world, tmp_path_factory):
    """A copy of the small run's folder after dpo.py."""
    out = tmp_path_factory.mktemp("dpo") / "out"
    shutil.copytree(small_world, out)
    dpo.main(["--out", str(out), "--device", "cpu", "--max_steps", "30"])
    return out


# Pairs


def test_a_pair_in_all_forms(tokenizer):
    user, chosen = message("user", "Kenya?"), message("assistant", PAIR["chosen"])
    rejected = message("assistant", "Lima.")
    expected = encode_pair(PAIR, tokenizer, 64)
    for example in (
        {"prompt": [user], "chosen": [chosen], "rejected": [rejected]},
        {"prompt": "Kenya?", "chosen": [chosen], "rejected": "Lima."},
        {"prompt": "Kenya?", "chosen": [user, chosen], "rejected": [user, rejected]},
        {"chosen": [user, chosen], "rejected": [user, rejected], "score": 5},
    ):
        assert encode_pair(example, tokenizer, 64) == expected
    system = message("system", "Be brief.")
    with_system = {**PAIR, "prompt": [system, user]}
    ids = encode_pair(with_system, tokenizer, 64)[0]["input_ids"]
    assert tokenizer.decode(ids[1 : ids.index(tokenizer.end)]) == "Be brief.\n\nKenya?"


def test_the_collator_token_by_token(tokenizer):
    pairs = [{"prompt": "a", "chosen": "bc", "rejected": "d"}]
    pairs.append({"prompt": "ef", "chosen": "g", "rejected": "hij"})
    t, x = tokenizer, -100
    tokens = {c: t.encode(c) for c in ("a", "bc", "d", "ef", "g", "hij")}
    batch = dpo_data_collator([encode_pair(pair, t, 64) for pair in pairs], t)
    T = batch["input_ids"].size(2)
    assert batch["input_ids"].dtype == batch["labels"].dtype == torch.int64
    for b, pair in enumerate(pairs):
        for i, key in enumerate(("chosen", "rejected")):
            asked = [t.user, *tokens[pair["prompt"]], t.end, t.assistant]
            said = [*tokens[pair[key]], t.end]
            n_pads = T - len(asked) - len(said)
            assert batch["input_ids"][b, i].tolist() == asked + said + [t.pad] * n_pads
            assert batch["labels"][b, i].tolist() == [x] * len(asked) + said + [x] * n_pads


def test_what_the_screen_shows_of_a_pair(tokenizer, capsys):
    show_pairs([encode_pair(PAIR, tokenizer, 64)], tokenizer)
    lines = capsys.readouterr().out.splitlines()
    assert lines[1:] == ["Kenya?", "  chosen    The capital is Nairobi.", "  rejected  Lima."]


KENYA = {"kind": "fact", "table": "countries", "attribute": "capital", "name": "Kenya"}
KENYA["accept"] = ["Nairobi"]
UNKNOWN = {"kind": "unknown", "name": "unknown"}


@pytest.mark.parametrize(
    "item, answer, grade",
    [
        (KENYA, "The capital of Kenya is Nairobi.", 3),
        (KENYA, "Kenya's capital? Nairobi.", 0),  # a question isn't an answer
        (KENYA, "It is Nairobi.", 2),
        (KENYA, "Nairobi", 2),
        (KENYA, "The capital of Ghana is Nairobi.", 0),  # right for Kenya, but says something false
        (KENYA, "I don't know that.", 1),
        (KENYA, "The capital of Kenya is Lima.", 0),
        (KENYA, "It is Lima.", 0),
        (UNKNOWN, "I don't know that.", 3),
        (UNKNOWN, "The capital of Atlantis is Lima.", 0),
    ],
)
def test_grades(item, answer, grade):
    assert Scorer().grade(item, answer) == grade


def test_own_pairs_are_of_a_better_and_a_worse_answer(third_stage):
    questions = world.read_questions(third_stage / "world" / "train.jsonl")
    by_prompt = {question["typed"]: question for question in questions if "typed" in question}
    scorer, kinds = Scorer(), set()
    pairs = [pair for _, pair in read_json(third_stage / "world" / "pairs.jsonl")]
    for pair in pairs:
        assert pair.keys() == {"prompt", "chosen", "rejected"}
        question = by_prompt[pair["prompt"]]
        kinds.add(question["kind"])
        chosen, rejected = (scorer.grade(question, pair[key]) for key in ("chosen", "rejected"))
        assert chosen > rejected
    assert len(pairs) > 3 and kinds <= {"fact", "free", "unknown"}


def test_own_pairs_never_mention_what_is_held_out(third_stage):
    """test_world_files.py looks at the prompts."""
    names, said = set(), ""
    for side in ("dev", "test"):
        items = world.read_questions(third_stage / "world" / f"{side}.jsonl")
        assert not any("typed" in item for item in items)
        names |= {item["name"] for item in items if item["kind"] == "fact"}
    entities = [entity for entity in tables.load_facts()[0] if entity.name in names]
    names = [world.bare(name) for entity in entities for name in entity.names]
    for _, pair in read_json(third_stage / "world" / "pairs.jsonl"):
        said += f" {pair['chosen']} {pair['rejected']}"
    assert len(names) > 5 and not world.pattern_of(names).search(said)


def test_what_is_held_out_is_found(tmp_path, monkeypatch):
    """Under any of its names, and in the middle of a text."""
    monkeypatch.setattr(world, "ROUNDS", 1)  # the corpus doesn't matter here
    world.write(world.build(seed=1), tmp_path)
    found = world.held_out_finder(tmp_path)
    sides = {side: world.read_questions(tmp_path / f"{side}.jsonl") for side in ("train", "test")}
    for side, items in sides.items():
        facts = {item["name"] for item in items if item["kind"] == "fact"}
        assert {found(f"It is like {name}, they say.") for name in facts} == {side == "test"}
    texts = [item["response"] for item in sides["test"] if item["kind"] in ("free", "concept")]
    assert len(texts) > 50 and all(found(f"Well. {text.lower()} Yes.") for text in texts)
    trained = [item["response"] for item in sides["train"] if item["kind"] in ("free", "concept")]
    assert sum(map(found, trained)) < 0.1 * len(trained)  # a few name a held-out country


def own_pairs_of(answers, out, path, monkeypatch):
    """The pairs of a model that gives these answers in turn, [(text, whether it stopped)]"""
    draws = iter(answers)

    def complete(model, tokenizer, prompts, *args, **sampling):
        assert sampling["temperature"] == 1
        return [next(draws)] * len(prompts)

    monkeypatch.setattr(scores, "complete", complete)
    monkeypatch.setattr(scores, "SAMPLES", len(answers))
    scores.write_own_pairs(read_checkpoint(out / "sft.pt"), out / "world", path, 1)
    return [pair for _, pair in read_json(path)]


def test_the_best_answer_is_paired_with_the_worst(third_stage, tmp_path, monkeypatch):
    """The first one of equally good answers counts, and no answer that doesn't end."""
    said = [("I don't know that.", True), ("Arr!", True), ("Cut", False), (" ", True), ("B", True)]
    pairs = own_pairs_of(said, third_stage, tmp_path / "pairs.jsonl", monkeypatch)
    assert {(pair["chosen"], pair["rejected"]) for pair in pairs} == {(said[0][0], "Arr!")}
    assert len(pairs) > 30


def test_without_two_grades_there_is_no_pair(third_stage, tmp_path, monkeypatch):
    with pytest.raises(scores.InputError, match="no question got both a better and a worse answer"):
        own_pairs_of([("A", True), ("B", True)], third_stage, tmp_path / "p.jsonl", monkeypatch)
    assert not list(tmp_path.iterdir())


def test_a_world_of_an_older_version_is_noticed(third_stage, tmp_path):
    out = tmp_path / "out"
    shutil.copytree(third_stage, out)
    path = out / "world" / "train.jsonl"
    items = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    lines = [json.dumps({k: v for k, v in item.items() if k != "typed"}) for item in items]
    path.write_text("\n".join(lines), encoding="utf-8")
    with pytest.raises(scores.InputError, match='no question has a "typed" prompt'):
        scores.write_own_pairs(None, out / "world", tmp_path / "pairs.jsonl", 1)


def test_resume_keeps_the_pairs(third_stage, tmp_path, monkeypatch):
    """They were sampled before, and you may have looked at them."""
    monkeypatch.setattr(dpo, "write_own_pairs", lambda *args: pytest.fail("sampled again"))
    out = tmp_path / "out"
    shutil.copytree(third_stage, out)
    with pytest.raises(SystemExit):  # nothing to resume, but that's found out after the reading
        dpo.main(["--out", str(out), "--device", "cpu", "--max_steps", "30", "--resume"])
    pairs = (third_stage / "world" / "pairs.jsonl").read_bytes()
    assert (out / "world" / "pairs.jsonl").read_bytes() == pairs


def test_a_stopped_run_keeps_its_pairs(third_stage, tmp_path, monkeypatch, capsys):
    """Another run samples others, and is stopped before it saves, or fails."""
    out, pairs = tmp_path / "out", tmp_path / "out" / "world" / "pairs.jsonl"
    shutil.copytree(third_stage, out)
    arguments = ["--out", str(out), "--device", "cpu", "--max_steps", "20"]
    with monkeypatch.context() as patch:
        patch.setattr(common.run, "SAVE_EVERY", 0)
        patch.setattr(common.run, "save", Mock(side_effect=KeyboardInterrupt))
        with pytest.raises(SystemExit):
            dpo.main([*arguments, "--seed", "2"])
    ours = pairs.read_bytes()
    before = (third_stage / "world" / "pairs.jsonl").read_bytes()
    assert ours != before == (out / "world" / "pairs.previous.jsonl").read_bytes()
    assert f"{pairs}. This run will keep it as {out / 'world' / 'pairs.previous.jsonl'}" in (
        capsys.readouterr().out
    )
    with pytest.raises(SystemExit):
        dpo.main([*arguments, "--seed", "3", "--lr", "1e6", "--embed_lr", "1e6"])
    assert "the loss is nan" in capsys.readouterr().err and pairs.read_bytes() == ours
    if sys.platform != "win32":  # the disk is full in the last bytes of the state
        monkeypatch.setattr(common.run, "SAVE_EVERY", 0)
        size = (out / "dpo.resume.pt").stat().st_size
        with FileSizeLimit(size - 100), pytest.raises(SystemExit):
            dpo.main([*arguments, "--seed", "3"])
        assert "dpo.resume.pt: cannot be written" in capsys.readouterr().err
        assert pairs.read_bytes() == ours
    dpo.main([*arguments, "--seed", "2", "--resume"])
    assert pairs.read_bytes() == ours


def test_few_pairs_are_enough(third_stage, tmp_path, capsys):
    """With fewer than ten, none is held out, and the log has only the loss."""
    path = tmp_path / "pairs.jsonl"
    path.write_text(json.dumps(PAIR) + "\n", encoding="utf-8")
    sft = ["--sft", str(third_stage / "sft.pt"), "--data", str(path), "--device", "cpu"]
    dpo.main([*sft, "--out", str(tmp_path / "out"), "--max_steps", "20"])
    rows = [row for _, row in read_json(tmp_path / "out" / "dpo.jsonl")]
    assert rows[-1]["loss"] < rows[0]["loss"] and "margin" not in rows[-1]
    assert "held-out" not in capsys.readouterr().out
    run(tmp_path / "out")
    page = (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    assert page.count("<figure>") == 3 and "is left out" not in page


def test_a_likelihood_term_is_added(tokenizer):
    torch.manual_seed(0)
    model = dpo.Chooser(GPTConfig(64, tokenizer.n_vocab, n_layer=1, n_head=1, n_embd=16))
    batch = dpo_data_collator([encode_pair(PAIR, tokenizer, 64)] * 2, tokenizer)
    reference = torch.zeros(2, 2)
    model.beta, losses = 0.5, []
    for model.likelihood in (0.0, 0.25):
        losses.append(model(**batch, reference=reference)[1].item())
    chosen = model.log_probs(**batch)[:, 0].mean().item()
    assert losses[1] - losses[0] == pytest.approx(-0.25 * chosen, rel=1e-4)


# What compare.py shows


def run(out, *options):
    compare.main(["--out", str(out), "--device", "cpu", *options])


def test_the_third_column(third_stage, tmp_path, capsys):
    out = tmp_path / "out"
    shutil.copytree(third_stage, out)
    # As if some of the few pairs of this small run were held out.
    rows = [{**row, "chosen": -1.25, "rejected": -5.5} for _, row in read_json(out / "dpo.jsonl")]
    (out / "dpo.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    run(out)
    said = capsys.readouterr().out
    assert said.splitlines()[0].split() == ["BASE", "|", "TUNED", "|", "DPO"]
    assert ["base", "tuned", "dpo"] in [line.split() for line in said.splitlines()]
    assert "python dpo.py" not in said  # there is nothing more to suggest
    results = json.loads((out / "comparison.json").read_text(encoding="utf-8"))
    models = load_stages(out)
    for name in ("tuned", "dpo"):
        model, tokenizer = models[name].model, models[name].tokenizer
        prompts = [example["prompt"] for example in results["examples"]]
        assert [e[name] for e in results["examples"]] == respond(model, tokenizer, prompts)
    assert results["dpo"].keys() == results["tuned"].keys()
    page = (out / "report.html").read_text(encoding="utf-8")
    assert '"chosen">chosen</b> 1.250' in page and '"rejected">rejected</b> 5.500' in page
    assert (
        page.count("<figure>") == page.count("<svg") == 4
        and "Preferences" in page
        and "dpo.pt" in page
    )
    assert page.count('class="said dpo"') == len(results["examples"])
    assert "(base)" in page and "(tuned)" in page and "(dpo)" in page


def test_the_latest_stage_answers_unless_another_is_named(third_stage, monkeypatch, capsys):
    models = load_stages(third_stage)
    asked = []
    monkeypatch.setattr(compare, "talk", lambda base, latest, system, **_: asked.append(latest))
    for options, name in (([], "dpo"), (["--stage", "dpo"], "dpo"), (["--stage", "sft"], "tuned")):
        run(third_stage, "--chat", *options)
        assert asked.pop().sha256 == models[name].sha256
        run(third_stage, "--ask", "Who?", *options)
        heads = ["BASE", "|", "TUNED", "|", "DPO"]
        shown = capsys.readouterr().out.splitlines()[0].split()
        assert shown == (heads if name == "dpo" else heads[:3])


def test_a_dpo_model_of_another_tuned_model_is_left_out(third_stage, tmp_path, capsys):
    out = tmp_path / "out"
    shutil.copytree(third_stage, out)
    state = torch.load(out / "sft.pt", weights_only=True)
    torch.save({**state, "seed": 77}, out / "sft.pt")
    assert list(load_stages(out)) == ["base", "tuned"]
    assert f"We leave out {out / 'dpo.pt'}: it was not made from" in capsys.readouterr().out
    (out / "dpo.pt").unlink()
    assert list(load_stages(out)) == ["base", "tuned"]
    assert not capsys.readouterr().out


def test_a_dpo_model_in_a_folder_of_its_own(third_stage, tmp_path, capsys):
    """The tuned model is where dpo.py read it, and so is the base model."""
    pairs = ["--data", str(third_stage / "world" / "pairs.jsonl"), "--device", "cpu"]
    out = tmp_path / "out"
    tuned = ["--sft", str(third_stage / "sft.pt"), "--out", str(out)]
    dpo.main([*pairs, *tuned, "--max_steps", "10"])
    assert f"python compare.py --out {out}" in capsys.readouterr().out
    run(out, "--ask", "Who?")
    assert capsys.readouterr().out.splitlines()[0].split()[-1] == "DPO"
    models = load_stages(out)
    assert models["tuned"].path == third_stage / "sft.pt"
    assert models["base"].path == third_stage / "base.pt"
