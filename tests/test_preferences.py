"""The runner of the measurements of preferences: what it runs, and how it counts."""

import shlex
import shutil

import pytest

import dpo
import preferences
from data import world
from test_readme import options_of


@pytest.fixture
def folder(small_world, tmp_path):
    """A folder with the small run as seed 1."""
    shutil.copytree(small_world, tmp_path / "1")
    return tmp_path


def test_it_runs_what_the_page_says_and_prints_means(folder, monkeypatch, capsys):
    """Without training: what it would train and measure is made up here."""
    ran, options = [], options_of(dpo.main)

    def run(commands, cwd, base, seed):
        for command in commands:
            _, program, *arguments = shlex.split(command)
            assert program != "dpo.py" or {a for a in arguments if a[:2] == "--"} <= options
            ran.append(command)
            if "--out" in arguments:
                out = cwd / arguments[arguments.index("--out") + 1]
                out.mkdir(parents=True, exist_ok=True)
                (out / program.replace(".py", ".pt")).touch()

    def write_own_pairs(tuned, world_folder, path, seed, grade):
        kenya = {"kind": "fact", "table": "countries", "attribute": "capital", "name": "Kenya"}
        kenya["accept"] = ["Nairobi"]
        answers = ("It is Nairobi.", "The capital of Kenya is Nairobi.", "It is Lima.")
        assert [grade(kenya, answer) for answer in answers] == [3, 2, 0]

    monkeypatch.setattr(preferences, "run", run)
    monkeypatch.setattr(preferences, "read_checkpoint", lambda path: None)
    monkeypatch.setattr(preferences, "write_own_pairs", write_own_pairs)
    monkeypatch.setattr(preferences, "figures", lambda path, folder: {"x": len(path.parts)})
    shutil.copytree(folder / "1", folder / "2")
    monkeypatch.setattr("sys.argv", ["", "--out", str(folder), "--seeds", "1", "2"])
    preferences.main()
    lines = [line.split(" | ") for line in capsys.readouterr().out.splitlines()]
    names = ["tuned", "dpo", "opponent", *(f"beta {b}" for b in preferences.BETAS)]
    names += ["likelihood 1", "half terse", "whole preferred", "terse preferred", "opponent"]
    runs = [line[0].removeprefix("| ") for line in lines[2:]]
    assert runs == names * 2 + names
    assert max(preferences.BETAS) >= 100 * min(preferences.BETAS)
    assert sum("--beta 1e-6 --likelihood 1" in command for command in ran) == 4
    betas = [command for command in ran if "--beta 0.03" in command]
    assert len(betas) == 2 and all("pairs.jsonl" in command for command in betas)


def test_how_it_counts(small_world, monkeypatch):
    """Sampled, a model refuses everything. At temperature 0, it answers everything rightly."""
    questions = world.read_questions(small_world / "world" / "test.jsonl")
    by_prompt = {item[key]: item for item in questions for key in ("prompt", "unseen")}

    def complete(model, tokenizer, prompts, chat, length, temperature):
        if temperature:
            return [("I don't know that.", True)] * len(prompts)
        items = [by_prompt[prompt] for prompt in prompts]
        return [(f"{item['name']}: {item.get('accept', ['Lima'])[0]}.", True) for item in items]

    monkeypatch.setattr(preferences, "complete", complete)
    monkeypatch.setattr(preferences, "score_strangers", lambda c: {"in all": 0.5, "refuses": 0.25})
    found = preferences.figures(small_world / "sft.pt", small_world)
    expected = {"known right 0": 100, "known refused 0": 0, "fact terse 0": 0}
    expected |= {"unknown answered 0": 100, "unknown refused 1": 100, "known refused 1": 100}
    expected |= {"known right 1": 0, "known wrong 1": 0, "strangers": 50, "strangers refused": 25}
    assert {key: found[key] for key in expected} == expected
    unknown = [item for item in questions if item["kind"] == "unknown"]
    facts = [item for item in questions if item["kind"] == "fact"]
    assert found["errors 0"] == 2 * len(unknown) and found["errors 1"] == 2 * len(facts)
