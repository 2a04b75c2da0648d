"""How src/ is built: who may import whom, what a script needs to answer --help, and what no file may mention."""

import ast
import graphlib
import re
import subprocess
import sys
from pathlib import Path

import pytest

import utils

SRC = utils.REPOSITORY / "src"
# the floors of the house, lowest first: a module imports from its own room and from lower floors
FLOORS = [["utils"], ["options"], ["disk"], ["nsd", "models"], ["training"], ["encoding", "sampling", "features"],
          ["evaluation", "sharing"]]
FLOOR_OF = {room: number for number, rooms in enumerate(FLOORS) for room in rooms}
# what a script may import at its top beside the standard library; these import nothing else themselves
LIGHT = ["utils", "options", "disk", "disk.names", "nsd", "nsd.sources"]


def module_of(file):
    """src/nsd/rows.py -> nsd.rows; src/nsd/__init__.py -> nsd."""
    return ".".join(file.relative_to(SRC).with_suffix("").parts).removesuffix(".__init__")


FILES = {module_of(file): file for file in sorted(SRC.rglob("*.py"))}
SCRIPTS = [module for module in FILES if "." not in module and module not in FLOOR_OF]


def imports_of(module, at_top=False):
    """Full names of the modules that a module imports, at any level or only while it is imported itself."""
    tree = ast.parse(FILES[module].read_text())
    nodes = [tree]
    for node in nodes:
        nodes += [child for child in ast.iter_child_nodes(node)
                  if not (at_top and isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda))]
    for node in nodes:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module}: a relative import"
            within = [f"{node.module}.{alias.name}" for alias in node.names]  # `from nsd import rows` is nsd.rows
            yield from (name if name in FILES else node.module for name in within)


def room_of(module):
    return module.partition(".")[0]


@pytest.mark.parametrize("module", FILES)
def test_imports_go_downwards(module):
    own = FLOOR_OF.get(room_of(module), len(FLOORS))
    for name in imports_of(module):
        room = room_of(name)
        assert name not in SCRIPTS, f"{module} imports the script {name}"
        if room in FLOOR_OF and room != room_of(module):
            assert FLOOR_OF[room] < own, f"{module} imports {name}, which is not below it"


def test_every_folder_is_a_room_that_says_what_it_is():
    """Without an __init__.py, a package of that name among the installed ones would be imported in its place."""
    assert {room_of(module) for module in FILES} - set(SCRIPTS) == set(FLOOR_OF)
    for folder in {file.parent for file in FILES.values()} - {SRC}:
        assert ast.get_docstring(ast.parse((folder / "__init__.py").read_text())), folder


def test_no_modules_import_each_other():
    graph = {module: {name for name in imports_of(module) if name in FILES} for module in FILES}
    graphlib.TopologicalSorter(graph).prepare()  # raises CycleError, which names them


@pytest.mark.parametrize("module", [*SCRIPTS, *LIGHT])
def test_only_the_standard_library_is_needed_at_the_top(module):
    heavy = [name for name in imports_of(module, at_top=True)
             if room_of(name) not in sys.stdlib_module_names and name not in LIGHT]
    assert not heavy, f"{module} imports {', '.join(heavy)} at its top"


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_bare_python_answers_at_once(script):
    """Without what the requirements install: the --help, and one line about a wrong flag."""
    command = [sys.executable, "-E", "-s", "-S", FILES[script]]
    shown, refused = (subprocess.run([*command, flag], capture_output=True, text=True, check=False)
                      for flag in ("--help", "--no_such_flag"))
    assert shown.returncode == 0 and not shown.stderr, shown.stderr
    assert ast.get_docstring(ast.parse(FILES[script].read_text())).splitlines()[0] in shown.stdout
    assert refused.returncode == 2 and not refused.stdout
    assert len(refused.stderr.splitlines()) == 1 and "--no_such_flag" in refused.stderr, refused.stderr


def test_reading_nsd_loads_nothing_that_it_does_not_need():
    """torch takes seconds; only batches are made of its tensors."""
    rooms = [module for module in FILES if room_of(module) == "nsd" and module != "nsd.batches"]
    seldom = ["torch", "webdataset", "scipy.io", "nibabel", "huggingface_hub", "diffusers", "transformers"]
    program = f"import sys, {', '.join(rooms)}; print([name for name in {seldom} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", program], cwd=SRC, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_src_does_not_know_the_demo():
    """The demo is files in real formats. One message may say that it, unlike NSD, runs on a CPU."""
    lines = [(file.relative_to(SRC), line) for file in sorted(SRC.rglob("*.*")) if "__pycache__" not in file.parts
             for line in file.read_text().splitlines() if re.search("demo", line, re.IGNORECASE)]
    assert [(file, line) for file, line in lines if "pictures take weeks" not in line] == []
    assert len(lines) == 1


def test_no_page_is_named_that_is_not_in_the_repository():
    listed = subprocess.run(["git", "-C", utils.REPOSITORY, "ls-files", "-z"], capture_output=True, text=True,
                            check=False)
    if listed.returncode:
        pytest.skip("not a git checkout")
    private = re.compile(r"\b(DES" + r"IGN|FIE" + r"LD)\b")  # pages of those who build this, which nobody else has
    for name in listed.stdout.split("\0")[:-1]:
        file = Path(utils.REPOSITORY, name)
        if file.is_file():
            named = private.search(file.read_bytes().decode(errors="ignore"))
            assert not named, f"{name} mentions {named[0]}"
