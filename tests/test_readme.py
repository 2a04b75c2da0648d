"""The pages tell the truth: commands and flags are real, links lead somewhere, scripts are explained.

Each bash script runs once per set of knobs that a page sets, with a program in place of Python that notes how it was
called; the commands of the pages are then parsed in this process, with their own flags in the place where that call
had them. scripts/demo.sh and scripts/test.sh are executed by CI; downloads, trainings and drawings by the tests of
their scripts.
"""

import ast
import contextlib
import functools
import importlib.metadata
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parent.parent
README, FLAGS = REPO / "README.md", REPO / "docs/flags.md"  # test_tracking.py compares the metrics of the latter
SCRIPTS = [*sorted(REPO.glob("scripts/*.sh")), REPO / "scripts/slurm/submit.sh"]  # the comments at their heads: --help
PAGES = [README, *sorted(REPO.glob("docs/*.md")), *sorted(REPO.glob("[a-zA-Z]*/README.md"))]
RUN_ELSEWHERE = {"demo.sh", "test.sh", "setup.sh", "submit.sh", "curves.sh", "lesions.sh"}  # by CI and tests
COMMAND = re.compile(r"^(?P<knobs>(?:[A-Z_]+=(?:\"[^\"]*\"|\S*) +)*)"
                     r"(?P<words>(?:bash )?(?:scripts/)?(?:slurm/)?(?!settings)\w+\.sh\b.*"
                     r"|source \S+|(?:\.venv/bin/)?(?:python3?|hf|wandb) .*)$")
FLAGS_HERE = "FLAGS_OF_THE_COMMAND"
LIGHT = {"options", "utils", "nsd", "disk", "scenes"}  # import the standard library and NumPy at most


def name_of(page):
    return page.relative_to(REPO).as_posix()


every_page = pytest.mark.parametrize("page", PAGES, ids=name_of)
every_page_and_script = pytest.mark.parametrize("page", [*PAGES, *SCRIPTS], ids=name_of)


def spans(page):
    """Code of a page: between backticks, and indented blocks' lines up to their comment."""
    if page.suffix == ".sh":  # of the comment at its head
        head = page.read_text().partition("\n\n")[0]
        yield from (re.split(r" {3,}", line.strip())[0] for line in re.findall("^# {3}(.*)", head, re.MULTILINE))
        yield from re.findall(r"(python3? src/\w+\.py --help)", head)
        return
    text = re.sub(r"\\\n\s*", "", page.read_text())  # a command over several lines
    yield from re.findall(r"`([^`]+)`", text.replace("\n", " "))
    yield from (line.partition(" # ")[0].strip() for line in text.splitlines() if line.startswith("    "))


def commands(page):
    """(knobs, words) of every command of a page, each of a chain (&&) by itself."""
    for span in dict.fromkeys(part for code in spans(page) for part in re.split(r" +&& +", code)):
        if found := COMMAND.match(span.replace("...", " ").replace("…", " ").strip()):
            yield found["knobs"], found["words"]


@functools.cache
def parser_of(script):
    return make_parser(script)


def make_parser(script):
    """The parser of a Python script, made without the libraries that only its work needs: those take ten seconds."""
    tree = ast.parse(script.read_text())
    module = {"__name__": script.stem, "__file__": str(script), "__doc__": ast.get_docstring(tree, clean=False)}
    for statement in tree.body:
        libraries = {name.partition(".")[0] for name in imported_by(statement)} - sys.stdlib_module_names - LIGHT
        if libraries:
            siblings = {name: script.with_name(f"{name}.py") for name in libraries}
            module |= {name: Script(file) for name, file in siblings.items() if file.exists()}
            continue
        with contextlib.suppress(NameError, AttributeError):  # made of a library: no parser needs it
            exec(compile(ast.Module([statement], []), script, "exec"), module)
    return module["get_parser"]()


def imported_by(statement):
    """Names of the modules that a statement imports."""
    if isinstance(statement, ast.Import):
        return [part.name for part in statement.names]
    return [statement.module] if isinstance(statement, ast.ImportFrom) else []


class Script:
    """Another script, of which a parser may be made."""

    def __init__(self, file):
        self.file = file

    def get_parser(self):
        return make_parser(self.file)


def python_scripts():
    return [file for folder in ("src", "benchmarks", "demo") for file in (REPO / folder).glob("*.py")
            if "def get_parser(" in file.read_text()]


def parse(script, words):
    """Raise AssertionError when a script does not take these words."""
    assert script.exists(), script
    try:
        parser_of(script).parse_args([word for word in words if word != "--dry_run"])
    except SystemExit as stop:
        assert stop.code == 0 and "--help" in words, f"{script.name} {shlex.join(words)}"


@pytest.fixture(scope="module")
def calls_of(tmp_path_factory):
    """(bash script, knobs) -> the words of every call of Python that it makes, FLAGS_HERE being its own flags."""
    folder = tmp_path_factory.mktemp("recorder")
    log, program = folder / "calls", folder / "recorder"
    program.write_text(f'#!/usr/bin/env bash\nprintf "%q " "$@" >>{log}; echo >>{log}\n')
    program.chmod(0o755)

    @functools.cache
    def calls(script, knobs):
        log.write_text("")
        environment = dict(knob.split("=", 1) for knob in shlex.split(knobs))
        if "LAUNCH" in environment:
            config = re.search(r"scripts/accelerate/(\w+)\.yaml", environment["LAUNCH"])
            assert config is None or config[1] == "X" or (REPO / config[0]).exists(), config[0]
            environment["LAUNCH"] = str(program)
        environment = {**os.environ, "PYTHON": str(program), **environment, "ROOT": str(folder)}
        result = subprocess.run(["bash", script, FLAGS_HERE], cwd=folder, capture_output=True, text=True, check=False,
                                env=environment)
        assert result.returncode == 0, result.stderr
        return [shlex.split(line) for line in log.read_text().splitlines()]

    return calls


def check_command(knobs, words, calls_of):
    """Raise AssertionError or SystemExit unless a command of a page is real."""
    words = shlex.split(words)
    tool = Path(words[0]).name
    if tool == "source":
        assert (REPO / words[1]).exists(), words[1]
    elif tool in ("wandb", "hf"):
        check_tool(tool, words)
    elif tool in ("python", "python3"):
        parse(REPO / words[1], words[2:])
    else:
        at = next(i for i, word in enumerate(words) if word.endswith(".sh"))
        script = REPO / "scripts" / ("slurm" if words[at].endswith("submit.sh") else "") / Path(words[at]).name
        assert script.exists(), script
        if script.name not in RUN_ELSEWHERE:
            made = calls_of(script, knobs)
            assert made, f"{script.name} does nothing"
            for called, *rest in made:
                place = rest.index(FLAGS_HERE)
                parse(Path(called), rest[:place] + words[at + 1:] + rest[place + 1:])


def check_tool(tool, words):
    """Raise AssertionError unless a tool of the environment has this command."""
    (entry,) = importlib.metadata.entry_points(group="console_scripts", name=tool)
    part = words[1:3] if tool == "hf" else words[1:2]
    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as stop:
        patch.setattr(sys, "argv", [tool, *part, "--help"])
        entry.load()()
    assert not stop.value.code, f"{tool} {shlex.join(part)}"
    assert all((REPO / word).exists() for word in words if word.endswith(".yaml"))


@every_page_and_script
def test_commands_are_real(page, calls_of):
    wrong = []
    for knobs, words in commands(page):
        try:
            check_command(knobs, words, calls_of)
        except AssertionError as error:
            wrong.append(f"{knobs}{words}: {str(error).splitlines()[0]}")
    assert not wrong, "\n".join(wrong)


def test_a_wrong_command_is_found(calls_of):
    for knobs, words in (("", "bash scripts/recon.sh --no_such_flag"), ("", "bash scripts/nothing.sh"),
                         ("STAGES=gnet ", "bash scripts/train.sh --prior_scale 3"), ("", "python src/recon.py --ids"),
                         ("", "python src/nothing.py"), ("", "wandb no_such_command"), ("", "source demo/nothing.sh"),
                         ('LAUNCH="accelerate launch --config_file scripts/accelerate/no.yaml" ', "train.sh")):
        with pytest.raises(AssertionError):
            check_command(knobs, words, calls_of)


def test_every_flag_that_is_mentioned_exists():
    known = {flag for script in python_scripts() for flag in parser_of(script)._option_string_actions}
    known |= {"--config_file", "--help"}  # accelerate's; everybody's
    for page in PAGES:
        mentioned = {flag for span in spans(page) if not span.startswith(("hf ", ".venv/bin/hf "))
                     for flag in re.findall(r"(?<![\w-])--[a-z][\w-]*", span)}
        assert mentioned <= known, f"{page}: {sorted(mentioned - known)}"


@every_page
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if target.startswith("http"):
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        assert file.exists(), target
        assert not anchor or anchor in anchors_of(file), target


def test_pages_that_the_code_points_to_exist():
    """In docstrings: docs/page.md, or docs/page.md, Section."""
    for file in (REPO / "src").rglob("*.py"):
        for page, section in re.findall(r"(docs/\w+\.md)(?:,\s+\"?([A-Z]\w+(?: \w+)*)(?=[\").]))?", file.read_text()):
            assert (REPO / page).exists(), f"{file}: {page}"
            anchor = section.lower().replace(" ", "-")
            assert not section or anchor in anchors_of(REPO / page), f"{file}: {page}, {section}"


def anchors_of(page):
    """The anchors that GitHub gives to the headings of a page."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_configurations_of_the_launcher_are_those_of_the_page():
    text = FLAGS.read_text()
    for config in (REPO / "scripts/accelerate").glob("*.yaml"):
        assert f"`{config.stem}`" in text, config


def test_the_readme_explains_src():
    text = README.read_text()
    for file in (REPO / "src").iterdir():
        if file.suffix == ".py" or any(file.glob("*.py")):
            assert f"`{file.name}{'' if file.suffix else '/'}`" in text, file.name


def test_the_readme_is_short_and_begins_with_the_two_commands():
    lines = README.read_text().splitlines()
    assert len(lines) <= 150
    for script in ("demo", "test"):
        assert any(line.startswith(f"    bash scripts/{script}.sh") for line in lines[:15])
