"""What the pages show runs: their Python blocks from top to bottom, and of commands every flag is known."""

import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer

from kvsim.cli.app import app

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
BLOCK = re.compile(r"(?:<!-- given: ([\w, ]+?)(?:;[^>]*)? -->\n)?```python\n(.*?)```", re.DOTALL)
FENCE = re.compile(r"```[a-z]*\n(.*?)```", re.DOTALL)
FLAG = re.compile(r"`(--[a-z][a-z-]+)[ =`]")
OF_OTHERS = {
    "--help",
    "--page",
    "--limit",
    "--model",
    "--text",
    "--layers",
    "--pages",
    "--exclude-editable",
}  # of scripts, of pip


def blocks() -> Iterator[Any]:
    """Each Python block of a page: its text, and the names that it takes from elsewhere."""
    for page in PAGES:
        for number, (given, text) in enumerate(BLOCK.findall(page.read_text(encoding="utf-8")), 1):
            names = [name.strip() for name in given.split(",") if name.strip()]
            yield pytest.param(text, names, id=f"{page.stem}-{number}")


@pytest.mark.parametrize(("text", "names"), list(blocks()))
def test_a_block_of_python_runs(text: str, names: list[str]) -> None:
    exec(compile(text, "<page>", "exec"), {name: GIVEN[name]() for name in names})  # noqa: S102 - this is what is tested


def _model() -> Any:
    pytest.importorskip("torch")
    from tiny_models import tiny_model

    return tiny_model("llama", max_position_embeddings=512, eos_token_id=None)


def _inputs() -> Any:
    torch = pytest.importorskip("torch")
    prompt = torch.arange(1, 41)[None]
    return {"input_ids": prompt, "attention_mask": torch.ones_like(prompt)}


GIVEN = {"model": _model, "inputs": _inputs}


def command_lines(page: Path) -> list[list[str]]:
    """The words after `kvsim` of every command that a page shows in a block."""
    found = []
    for block in FENCE.findall(page.read_text(encoding="utf-8")):
        for line in block.replace("\\\n", " ").splitlines():
            for part in re.split(r"\s*;\s*|\s{4,}(?=kvsim )", line.partition("#")[0]):
                match = re.match(r"(?:python (?:-X dev )?-m )?kvsim\s+(.*)", part.strip())
                if match:
                    found.append(shlex.split(re.sub(r"[\[\]]", "", re.split(r"\s{8,}", match[1])[0])))
    return found


def resolved(words: list[str]) -> tuple[Any, list[str]]:
    """The command that words name, and what is left of them."""
    command: Any = typer.main.get_command(app)
    while words and words[0] in getattr(command, "commands", {}):
        command, words = command.commands[words[0]], words[1:]
        command = getattr(command, "loaded", command)
    return command, words


def flags(command: Any) -> set[str]:
    """The flags of a command."""
    return {flag for one in command.params for flag in (*one.opts, *one.secondary_opts)}


COMMANDS = [pytest.param(words, id=" ".join(words[:6])) for page in PAGES for words in command_lines(page)]


def test_commands_are_found() -> None:
    assert len(COMMANDS) >= 15


@pytest.mark.parametrize("words", COMMANDS)
def test_a_command_has_the_flags_that_are_shown(words: list[str]) -> None:
    command, left = resolved(words)
    assert not hasattr(command, "commands"), f"{words[0]} is a group; name one of its commands"
    assert [word for word in left if word.startswith("--") and word.partition("=")[0] not in flags(command)] == []


def _every_flag(command: Any) -> set[str]:
    command = getattr(command, "loaded", command)
    return flags(command).union(*(_every_flag(inner) for inner in getattr(command, "commands", {}).values()))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_every_flag_in_the_text_is_one(page: Path) -> None:
    known = _every_flag(typer.main.get_command(app)) | OF_OTHERS
    text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    assert [flag for flag in FLAG.findall(text) if flag not in known] == []
