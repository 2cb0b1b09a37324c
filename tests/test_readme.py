"""The tutorial is tested like code: its blocks run, its excerpts occur, its options exist."""

import code
import contextlib
import io
import re
import textwrap

import pytest

import compare
import dpo
import pretrain
import sft
from common.presets import PRESETS
from conftest import ROOT

PAGES = {
    path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8")
    for path in (ROOT / "README.md", ROOT / "data" / "README.md", *ROOT.glob("docs/**/*.md"))
}
README, REFERENCE = PAGES["README.md"], PAGES["docs/reference.md"]
# A block is its language, its file, its text, and the text of a block of output that follows it.
BLOCK = r"^```(\w*)(?: (\S+))?\n(.*?)^```$(?:\n+^```text\n(.*?)^```$)?"
BLOCKS = re.findall(BLOCK, README, re.MULTILINE | re.DOTALL)
EXCERPTS = [(file, text) for language, file, text, _ in BLOCKS if language == "python" and file]
SCRIPTS = [(text, out) for language, file, text, out in BLOCKS if language == "python" and not file]
FENCED = re.compile(r"^```.*?^```$", re.MULTILINE | re.DOTALL)
OPTION = r"(?<![\w-])--[a-z][\w-]*"


def test_the_page_has_what_is_tested_here():
    assert len(SCRIPTS) >= 2 and len(EXCERPTS) >= 7 and all(output for _, output in SCRIPTS)
    assert len(PAGES) >= 7


def test_the_page_can_be_read_in_an_evening():
    lines = README.splitlines()
    assert len(lines) <= 450
    assert [line for line in lines if len(line) > 120] == []


@pytest.mark.parametrize("script, output", SCRIPTS, ids=range(len(SCRIPTS)))
def test_python_blocks_run_and_print_what_stands_below(script, output, monkeypatch):
    monkeypatch.syspath_prepend(ROOT)
    printed, names = io.StringIO(), {}
    for earlier, _ in SCRIPTS:  # a block may use what the blocks above it made
        with contextlib.redirect_stdout(printed if earlier == script else io.StringIO()):
            exec(compile(earlier, "README.md", "exec"), names)
        if earlier == script:
            break
    assert printed.getvalue() == output


def test_python_blocks_can_be_pasted(monkeypatch):
    """Line by line, as at a prompt, with Enter after each block. A loop must end the block."""
    monkeypatch.syspath_prepend(ROOT)
    console, printed, complaints = code.InteractiveConsole(), io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(complaints):
        for script, _ in SCRIPTS:
            for line in [*script.splitlines(), ""]:
                console.push(line)
    assert complaints.getvalue() == ""
    assert printed.getvalue() == "".join(output for _, output in SCRIPTS)


@pytest.mark.parametrize("file, text", EXCERPTS, ids=range(len(EXCERPTS)))
def test_excerpts_occur_in_their_files(file, text):
    """As a whole, line for line. Only the indentation may differ."""
    wanted = textwrap.dedent(text)
    lines = (ROOT / file).read_text(encoding="utf-8").splitlines(keepends=True)
    n = len(wanted.splitlines())
    assert any(textwrap.dedent("".join(lines[i : i + n])) == wanted for i in range(len(lines)))


def options_of(main):
    with pytest.raises(SystemExit), contextlib.redirect_stdout(io.StringIO()) as text:
        main(["--help"])
    return set(re.findall(OPTION, text.getvalue())) | {"--help"}


def test_every_option_named_exists():
    programs = {"pretrain.py": pretrain.main, "sft.py": sft.main, "dpo.py": dpo.main}
    programs["compare.py"] = compare.main
    options = {name: options_of(main) for name, main in programs.items()}
    command = r"(pretrain|sft|dpo|compare)\.py((?: +(?:-[^\s`]+|\"[^\"]*\"|[\w./]+))*)"
    in_commands = 0
    pages = "\n".join(PAGES.values())
    for program, rest in re.findall(command, pages):
        used = set(re.findall(r"(?<![\w-])--[\w_]+", rest))
        in_commands += len(used)
        assert used <= options[program + ".py"], (program, rest)
    assert in_commands > 15
    elsewhere = {"--index-url", "--nproc_per_node", "--check"}  # pip's, torchrun's and ruff's
    for file in ("tests/bench.py", "docs/experiments.py", "docs/preferences.py"):
        elsewhere |= set(re.findall(r"--[a-z_]+", (ROOT / file).read_text(encoding="utf-8")))
    named = set(re.findall(OPTION, re.sub(r"^---.*$", "", pages, flags=re.MULTILINE)))
    assert named <= set.union(*options.values()) | elsewhere


def anchors(page):
    headings = re.findall(r"^#+ (.*)$", FENCED.sub("", page), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("path", PAGES)
def test_every_link_points_at_something(path):
    links = re.findall(r"\]\(([^)]+)\)", PAGES[path])
    for link in links:
        file, _, anchor = link.partition("#")
        if link.startswith("https://"):
            assert re.fullmatch(r"https://[\w.-]+\.\w+/\S*", link)
            continue
        target = ((ROOT / path).parent / file).resolve() if file else ROOT / path
        assert target.exists(), link
        if anchor:
            assert anchor in anchors(PAGES[target.relative_to(ROOT).as_posix()]), link
    assert links or path not in ("README.md", "docs/reference.md")


def test_files_tests_and_functions_that_are_named_exist():
    paths = [p for g in ("*.py", "common/*.py", "data/**/*.py", "tests/*.py") for p in ROOT.glob(g)]
    code = "\n".join(path.read_text(encoding="utf-8") for path in paths)
    pages = FENCED.sub("", "\n".join(PAGES.values()))
    for name in re.findall(r"`(?:GPT\.)?(\w+)\(\)`|`(test_\w+)`", pages):
        assert re.search(rf"def {''.join(name)}\b", code), name
    for name in re.findall(r"`([A-Z]\w+)\.\w+`", pages):
        assert re.search(rf"class {name}\b", code), name
    for page, text in PAGES.items():
        for file in re.findall(
            r"(?<![\w/])((?:tests/|common/|data/|docs/|world/)*\w+\.py)\b", text
        ):
            assert (ROOT / file).exists() or (ROOT / page).parent.joinpath(file).exists(), file


def test_the_presets_are_as_the_table_says():
    for name, sizes in PRESETS.items():
        if name == "gpt2":
            continue
        config = pretrain.PretrainConfig(**sizes)
        row = next(line for line in REFERENCE.splitlines() if line.startswith(f"| `{name}` |"))
        for number, unit in (
            (config.n_layer, "layers"),
            (config.n_embd, "wide"),
            (config.vocab_size, "tokens"),
            (config.max_steps, "steps"),
        ):
            assert f"{number:,} {unit}" in row


def test_the_reader_finds_every_file_of_the_program():
    """Each file at the top, in data/ and in common/, and each folder of code, is in the table."""
    for path in [*ROOT.glob("*.py"), *ROOT.glob("data/*.py"), *ROOT.glob("common/*.py")]:
        if path.name != "__init__.py":
            assert f"](../{path.relative_to(ROOT).as_posix()})" in REFERENCE, path
    for folder in ("data/world", "common/browser"):
        assert f"](../{folder}" in REFERENCE, folder
