"""Every command and option that the page about the command line names exists."""

import re
from pathlib import Path

import pytest
import typer
import typer.core

from bn_jax.lab.command import app

PAGE = (Path(__file__).parent.parent.parent / "docs/command_line.md").read_text()
GROUP = typer.main.get_command(app)
assert isinstance(GROUP, typer.core.TyperGroup)
COMMANDS = GROUP.commands
VISIBLE = {name for name, command in COMMANDS.items() if not command.hidden}
BLOCKS = "\n".join(re.findall(r"^```sh\n(.*?)^```$", PAGE, re.DOTALL | re.MULTILINE))
LINES = [line.split("#")[0].strip(" &") for line in BLOCKS.splitlines() if line]


def options_of(command):
    """The flags of a command, also those that turn something off."""
    parameters = COMMANDS[command].params
    return {flag for of in parameters for flag in (*of.opts, *of.secondary_opts)} | {"--help"}


def test_there_are_lines():
    assert len(LINES) >= 25
    assert all(line.startswith("bn-jax ") for line in LINES)


@pytest.mark.parametrize("line", LINES)
def test_a_line_is_a_command_with_its_options(line):
    _, command, *arguments = line.split()
    assert command in VISIBLE
    # Parsing checks names, numbers of arguments and choices, and runs nothing.
    COMMANDS[command].make_context(command, arguments, resilient_parsing=False)


def test_the_page_names_every_command():
    assert set(re.findall(r"bn-jax ([a-z]+)", BLOCKS)) == VISIBLE


def test_options_in_the_text_exist():
    prose = re.sub(r"^```sh\n.*?^```$", "", PAGE, flags=re.DOTALL | re.MULTILINE)
    named = set(re.findall(r"`(--[a-z-]+)", prose))
    assert named
    assert named <= set().union(*map(options_of, VISIBLE))


def test_each_option_of_train_is_named():
    assert options_of("train") - set(re.findall(r"--[a-z-]+", PAGE)) == {"--progress"}


def test_links_lead_to_sections_of_the_page():
    targets = set(re.findall(r"^\((.*?)\)=$", PAGE, re.MULTILINE))
    assert set(re.findall(r"\]\(#(.*?)\)", PAGE)) == targets
