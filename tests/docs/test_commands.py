"""Every command of README and documentation passes the parsing of flags and settings of its program."""

from pathlib import Path

import pytest

import doc_commands as commands

PAGES = commands.pages()


@pytest.fixture(scope="module")
def runs() -> dict[str, list[str]]:
    found = [command for page in PAGES for command in commands.commands(page)]
    assert len(found) > 50, "the extraction finds the commands"
    return commands.known_runs(found)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(commands.ROOT)))
def test_programs_accept_the_commands_of_a_page(page: Path, runs: dict[str, list[str]]):
    problems = {}
    for command in commands.commands(page):
        if found := commands.problem(command, runs):
            problems[f"{command.place}: {' '.join(command.words)}"] = found
    assert not problems, "\n".join(f"{name}\n    {found}" for name, found in problems.items())


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(commands.ROOT)))
def test_python_of_a_page_can_be_read(page: Path):
    for line, language, content in commands.blocks(page.read_text(encoding="utf-8")):
        if language == "python":
            assert not commands.python_problem(content), f"{page.name}:{line}: {commands.python_problem(content)}"


WRONG = {
    "python -m ymplug_jax.main --config configs/tiny/pretrain.py --wrokdir x": "--wrokdir",
    "python -m ymplug_jax.main --config configs/tiny/pretrain.py --config.train.batchsize=8": "batch_size",
    "python -m ymplug_jax.main --config configs/tiny/pretrain.py --config.train.batch_size=many": "many",
    "python -m ymplug_jax.main --config configs/tiny/nothing.py": "nothing.py",
    "python -m ymplug_jax.main --workdir runs/unknown --config.data.nothing=1": "nothing",
    "python -m ymplug_jax.predict caption --chekpoint RUN": "--chekpoint",
    "python -m ymplug_jax.convert --model nothing --source a --out b": "nothing",
    "python -m ymplug_jax.compare a b --ot x": "--ot",
    "python -m data_prep.build_shards --config pretrain --csv a --video_root b --out c --frames 8": "--frames",
    "python -m data_prep.word_pieces --csv a --out b --nothing c": "--nothing",
    "python -m benchmarks.gelu --nothing": "--nothing",
    "X='--nothing 1'; python -m data_prep.word_pieces --csv a --out b $X": "--nothing",
    "for X in pretrain other; do\n  python -m data_prep.build_shards --config $X --csv a --video_root b --out c\ndone": "other",
    "make nothing": "nothing",
    "pip install -e '.[nothing]'": "nothing",
    "launch/nothing.sh --config x": "nothing.sh",
    "python -m pytest tests/nothing.py": "nothing.py",
    "pyhton -m ymplug_jax.main": "pyhton",
}


@pytest.mark.parametrize("command", WRONG)
def test_a_wrong_command_is_found(command: str, tmp_path: Path):
    page = tmp_path / "page.md"
    page.write_text(f"Text\n\n```bash\nmake test\n{command}\n```\n", encoding="utf-8")
    found = commands.commands(page)
    problems = [what for one in found if (what := commands.problem(one, {}))]
    assert len(problems) == 1 and WRONG[command] in problems[0], problems
    assert found[0].place.endswith("page.md:3")
