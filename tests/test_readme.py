"""Do the README and the pages beside it tell the truth about commands, files and settings?"""

import re
from pathlib import Path

import pytest
import typer
import yaml

from flows import cli
from ptq.config import PtqConfig

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
COMMANDS = typer.main.get_command(cli.app).commands
CODE_LINES = [line.strip() for line in README.splitlines() if line.startswith("    ")]


def test_every_make_target_of_the_readme_exists():
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    named = set(re.findall(r"\bmake ([a-z]+)", README))
    assert {"demo", "test"} <= named <= targets


def test_every_command_of_the_readme_exists_and_none_is_left_out():
    named = set(re.findall(r"\bptq ([a-z]+)\b", README)) - {"quantizes"}
    assert named == set(COMMANDS)


@pytest.mark.parametrize("line", [line for line in CODE_LINES if "bin/ptq " in line])
def test_the_options_of_a_command_line_exist(line):
    words = line.split("bin/ptq ")[1].split()
    known = {option for parameter in COMMANDS[words[0]].params for option in parameter.opts}
    assert {word for word in words if word.startswith("--")} <= known


def test_there_are_command_lines_to_check():
    assert [line for line in CODE_LINES if "bin/ptq quantize" in line]


@pytest.mark.parametrize("page", ["README.md", "CONTRIBUTING.md", "SECURITY.md", "docs/architecture.md"])
def test_every_file_that_a_page_names_exists(page):
    text = (ROOT / page).read_text()
    files = re.findall(r"`((?:ptq|tasks|flows|tests|docs|benchmarks)/[\w./]+)`", text)
    assert files
    assert [file for file in files if not (ROOT / file).exists()] == []


def test_every_link_of_the_pages_leads_to_a_file():
    pages = [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")]
    links = [(page, link) for page in pages for link in re.findall(r"\]\(([\w./-]+)\)", page.read_text())]
    assert len(links) >= 6
    assert [(page.name, link) for page, link in links if not (page.parent / link).exists()] == []


def test_the_yaml_example_is_a_valid_config():
    block = "\n".join(line for line in CODE_LINES if re.match(r"(model|data|calibration|gate): \{", line))
    config = PtqConfig.model_validate(yaml.safe_load(block))
    assert config.calibration.methods == ("max", "entropy")


def test_ci_runs_the_test_command_of_the_readme():
    assert re.search(r"^make test$", (ROOT / ".ci" / "run").read_text(), re.MULTILINE)
