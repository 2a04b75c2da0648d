"""Every command in the READMEs is real: its script runs as far as Python, and each Python script knows its flags.

scripts/demo.sh and scripts/test.sh are executed by CI; downloads, trainings and drawings by the tests of their scripts.
"""

import importlib
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parent.parent
READMES = [REPO / "README.md", *sorted(REPO.glob("[a-zA-Z]*/README.md"))]
RUN_BY_CI = {"demo.sh", "test.sh", "setup.sh"}
COMMAND = re.compile(r"^(?P<knobs>(?:[A-Z_]+=(?:\"[^\"]*\"|\S*) +)*)"
                     r"(?P<words>(?:bash )?(?:scripts/)?(?:slurm/)?\w+\.sh\b.*"
                     r"|(?:\.venv/bin/)?(?:python|hf|wandb) .*)$")


def spans(readme):
    """Code of a README: between backticks, and indented blocks' lines up to their comment."""
    text = re.sub(r"\\\n\s*", "", readme.read_text())  # a command over several lines
    yield from re.findall(r"`([^`]+)`", text.replace("\n", " "))
    yield from (line.partition(" # ")[0].strip() for line in text.splitlines() if line.startswith("    "))


def commands():
    for readme in READMES:
        for span in dict.fromkeys(spans(readme)):
            if found := COMMAND.match(span.replace("...", " ").replace("…", " ").strip()):
                yield pytest.param(found["knobs"], found["words"], id=f"{readme.parent.name}: {span}")


def parsers():
    """{script: its parser} of every Python script with flags."""
    sys.path[:0] = [str(REPO / "src"), str(REPO / "benchmarks"), str(REPO / "demo")]
    scripts = [file for folder in ("src", "benchmarks", "demo") for file in (REPO / folder).glob("*.py")
               if "def get_parser(" in file.read_text() and file.stem != "scoring" and file.stem != "training"]
    return {file: importlib.import_module(file.stem).get_parser() for file in scripts}


@pytest.fixture(scope="module")
def parser_of():
    return parsers()


@pytest.fixture
def recorder(tmp_path):
    """A program that stands in for Python, and the lines of words it was called with."""
    log, program = tmp_path / "calls", tmp_path / "recorder"
    program.write_text(f'#!/usr/bin/env bash\nprintf "%q " "$@" >>{log}; echo >>{log}\n')
    program.chmod(0o755)
    return program, lambda: [shlex.split(line) for line in log.read_text().splitlines()] if log.exists() else []


def parse(parser_of, script, words):
    """What argparse says to the words of a call."""
    parser = parser_of[script]
    try:
        parser.parse_args([word for word in words if word != "--dry_run"])
    except SystemExit as stop:
        assert stop.code == 0 and "--help" in words, f"{script.name} {shlex.join(words)}"


@pytest.mark.parametrize(("knobs", "words"), list(commands()))
def test_a_command_of_a_readme_is_real(knobs, words, parser_of, recorder, tmp_path):
    program, calls = recorder
    environment = dict(knob.split("=", 1) for knob in shlex.split(knobs))
    words = shlex.split(words)
    if words[0] in ("wandb", "hf", ".venv/bin/wandb", ".venv/bin/hf"):
        tool = Path(sys.executable).parent / Path(words[0]).name
        part = words[1:3] if tool.name == "hf" else words[1:2]
        known = subprocess.run([tool, *part, "--help"], capture_output=True, check=False)
        assert known.returncode == 0, known.stderr
        assert all((REPO / word).exists() for word in words if word.endswith(".yaml"))
    elif Path(words[0]).name == "python":
        parse(parser_of, REPO / words[1], words[2:])
    else:
        script = next(Path(word).name for word in words if word.endswith(".sh"))
        folder = REPO / "scripts" / ("slurm" if script == "submit.sh" else "")
        assert (folder / script).exists()
        if script in RUN_BY_CI or script == "submit.sh":  # that is run by test_slurm.py
            return
        if "LAUNCH" in environment:
            config = re.search(r"scripts/accelerate/(\w+)\.yaml", environment["LAUNCH"])
            assert config is None or config[1] == "X" or (REPO / config[0]).exists()
            environment["LAUNCH"] = str(program)
        root = {"ROOT": str(tmp_path)}
        flags = words[next(i for i, word in enumerate(words) if word.endswith(".sh")) + 1:]
        result = subprocess.run(["bash", folder / script, *flags], cwd=tmp_path, capture_output=True, text=True,
                                check=False, env={**os.environ, "PYTHON": str(program), **environment, **root})
        assert result.returncode == 0 and calls(), result.stderr
        for called, *rest in calls():
            parse(parser_of, Path(called), rest)


def test_every_flag_that_is_mentioned_exists(parser_of):
    known = {flag for parser in parser_of.values() for flag in parser._option_string_actions}
    known |= {"--config_file", "--help"}  # accelerate's; everybody's
    for readme in READMES:
        mentioned = {flag for span in spans(readme) if not span.startswith(("hf ", ".venv/bin/hf "))
                     for flag in re.findall(r"(?<![\w-])--[a-z][\w-]*", span)}
        assert mentioned <= known, f"{readme}: {sorted(mentioned - known)}"


def test_configurations_of_the_launcher_are_those_of_the_readme():
    text = (REPO / "README.md").read_text()
    for config in (REPO / "scripts/accelerate").glob("*.yaml"):
        assert f"`{config.stem}`" in text, config


def test_the_readme_stays_short():
    assert len((REPO / "README.md").read_text().splitlines()) <= 300
