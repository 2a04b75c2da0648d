"""The bash scripts' knobs and --help, with a program in place of Python that writes down what it is called with."""

import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parent.parent
SCRIPTS = sorted(REPO.glob("scripts/*.sh"), key=lambda file: file.name)
SHOWING = [file for file in [*SCRIPTS, REPO / "scripts/slurm/submit.sh"] if file.name not in ("common.sh", "help.sh")]
RUNNING = ["check_data", "download", "evaluate", "features", "maps", "recon", "score", "train"]  # that take knobs
# where their names differ
FIRST = {"features": "img2feat.py", "train": "train_c.py", "score": "score_c.py", "maps": "map_brain.py"}
G = [f"g_{k}" for k in (2, 4, 6, 8, 10, 12)]


@pytest.fixture
def call(tmp_path):
    """Run scripts/NAME.sh; returns the finished process, with the words of every call of Python as `calls`."""
    log, program = tmp_path / "calls", tmp_path / "program"
    program.write_text(f'#!/usr/bin/env bash\nprintf "%q " "$@" >>{log}; echo >>{log}\n')
    program.chmod(0o755)

    def call(name, *flags, scripts=REPO / "scripts", **knobs):
        log.write_text("")
        environment = {"PATH": os.environ["PATH"], "ROOT": str(tmp_path), "PYTHON": str(program), **knobs}
        done = subprocess.run(["bash", scripts / f"{name}.sh", *flags], env=environment, cwd=tmp_path, text=True,
                              capture_output=True, check=False)
        done.calls = [shlex.split(line) for line in log.read_text().splitlines()]
        return done

    return call


def after(words, flag):
    """The words that follow a flag, up to the next one."""
    words = words[words.index(flag) + 1:]
    return words[:next((i for i, word in enumerate(words) if word.startswith("--")), len(words))]


def names(calls):
    return [Path(words[0]).name for words in calls]


@pytest.mark.parametrize("name", RUNNING)
@pytest.mark.parametrize(("knob", "value", "words"), [
    ("FEATS", "g2", "g2 is not a feature; wanted c, z, g_2 ... g_12"), ("FEATS", "c q", "q is not a feature"),
    ("FEATS", "c,z", "c,z is not a feature"), ("FEATS", "g_3", "g_3 is not a feature"),
    ("STAGES", "fine-tune", "fine-tune is not a stage; wanted pretrain, synthetic"),
    ("SUBJ", "100", "100 is not a subject; wanted 1 ... 99"), ("SUBJ", "sub-01", "is not a subject"),
    ("DRY_RUN", "yes", "yes is not a setting; wanted 1 (yes) or 0 (no)"), ("WANDB_LOG", "true", "true is not"),
    ("PYTHON", "/nowhere/python", "/nowhere/python is not a program"), ("LAUNCH", "acelerate x", "acelerate is not"),
])
def test_a_wrong_value_of_a_knob_is_one_line_and_nothing_runs(call, name, knob, value, words):
    done = call(name, **{knob: value})
    assert done.returncode == 2 and not done.calls and not done.stdout
    (line,) = done.stderr.splitlines()
    assert line.startswith(f"error: {knob}: ") and words in line


@pytest.mark.parametrize(("name", "value", "wanted"), [
    ("FEAT", "c", "FEATS"), ("FEATURES", "g_2 z", "FEATS"), ("STAGE", "finetune", "STAGES"), ("SUBJECT", "2", "SUBJ"),
    ("SUBJECTS", "1 2", "SUBJ"), ("SUB", "subj02", "SUBJ"), ("JOB", "3", "JOBS")])
def test_a_name_that_is_nearly_a_knobs_is_refused(call, name, value, wanted):
    done = call("train", **{name: value})
    assert done.returncode == 2 and not done.calls
    assert done.stderr == f"error: {name}: no such knob; wanted {wanted}\n"


@pytest.mark.parametrize("subj", ["2", "subj02", "12"])
def test_curves_draw_through_bottlenecks_and_from_few_sessions_and_compare_them(call, tmp_path, subj):
    folder = tmp_path / f"outputs_all/subj{int(subj[-2:].lstrip('j')):02d}/sessions4/30/0.8"
    folder.mkdir(parents=True)
    (folder / "index.csv").touch()
    done = call("curves", "--seed", "3", SUBJ=subj, FEATS="c", BOTTLENECKS="1 20", SESSIONS="4")
    assert done.returncode == 0, done.stderr
    assert names(done.calls) == ["score_c.py", "recon.py"] * 2 + ["train_c.py"] * 2 + ["score_c.py", "recon.py",
                                                                                      "evaluate.py"]
    drawn = [words for words in done.calls if names([words]) == ["recon.py"]]
    assert [after(words, "--control") for words in drawn[:2]] == [["bottleneck1"], ["bottleneck20"]]
    assert all(after(words, "--seed") == ["3"] for words in drawn)
    assert after(drawn[2], "--num_sessions") == ["4"] and after(drawn[2], "--method") == ["sessions4"]
    assert after(done.calls[-1], "--compare") == [f"sessions 4={folder}"]
    done = call("curves", BOTTLENECKS="a few")
    assert done.returncode == 2 and not done.calls and "BOTTLENECKS: a few are no numbers" in done.stderr


def test_lesions_are_scored_drawn_and_compared(call):
    done = call("lesions", "--seed", "3", FEATS="c", WITHOUT="V1,V2 V4", ONLY="higher_vis")
    assert done.returncode == 0, done.stderr
    assert names(done.calls) == ["score_c.py", "recon.py"] * 3 + ["evaluate.py"]
    for i, (flag, regions) in enumerate((("--without", "V1,V2"), ("--without", "V4"), ("--voxels", "higher_vis"))):
        assert all(after(words, flag) == [regions] for words in done.calls[2 * i:2 * i + 2])
        assert after(done.calls[2 * i + 1], "--seed") == ["3"]
    assert names(call("lesions", FEATS="c", WITHOUT="", ONLY="").calls) == ["evaluate.py"]


def test_what_other_programs_export_is_let_through(call):
    others = {"FEATURES": "sandbox ccache", "STAGE": "prod", "SUBJECT": "bert", "SUBJECTS_DIR": "/data", "JOB": "dbus",
              "SLURM_JOB_ID": "7", "FEAT": "/opt/fsl/feat", "SUB": "sub-02"}
    done = call("score", FEATS="c", **others)
    assert done.returncode == 0 and not done.stderr and names(done.calls) == ["score_c.py"]


def test_without_data_the_demo_world_is_named_where_it_is(call, tmp_path):
    """Only where ROOT is left to be the repository, by scripts that read results."""
    note = "note: there is no data in {} yet; to work on the demo world: source demo/settings.sh\n"
    copy = tmp_path / "clone"
    shutil.copytree(REPO / "scripts", copy / "scripts")
    for world, name, root, wanted in ((False, "score", "", ""), (True, "score", "", note.format(copy)),
                                      (True, "download", "", ""), (True, "score", str(tmp_path), "")):
        if world:
            (copy / "demo/nsddata/experiments").mkdir(parents=True, exist_ok=True)
        done = call(name, scripts=copy / "scripts", ROOT=root, FEATS="c")
        assert done.returncode == 0 and done.stderr == wanted


def test_features_in_every_script_that_lists_them(call):
    for feats, wanted in (("g", G), ("c g_4 c", ["c", "g_4"]), ("g_14 z", ["g_14", "z"])):
        (words,) = call("features", FEATS=feats).calls
        assert after(words, "--feats") == wanted
    (words,) = call("features").calls
    assert "--feats" not in words  # all
    assert after(call("maps", FEATS="c z").calls[0], "--feats") == ["c", "z"]
    assert "--feats" not in call("maps").calls[0]
    (words,) = call("features", "--feats", "z", FEATS="c").calls
    assert words[-2:] == ["--feats", "z"], "the user's flag is the last, and wins"
    (words,) = call("check_data", FEATS="c").calls
    assert after(words, "--feats") == ["c"]
    for name in ("train", "score"):
        made = call(name, FEATS="g z", STAGES="finetune").calls
        assert names(made) == [f"{name}_z.py", f"{name}_g.py"] and after(made[1], "--feat") == G
    assert names(call("score", FEATS=" ").calls) == ["score_c.py", "score_z.py", "score_g.py"]  # empty: all


def test_stages(call):
    made = call("train", FEATS="c", STAGES="pretrain ridge gnet adapter", TRAIN_ADAPTER_FLAGS="--max_lr 1").calls
    assert names(made) == ["train_c.py", "train_c.py", "train_gnet.py", "train_adapter.py"]
    assert after(made[3], "--max_lr") == ["1"] and "--max_lr" not in made[2]
    assert "--multi_subject" in made[0] and after(made[1], "--model") == ["ridge"]
    made = call("train", FEATS="c", STAGES="synthetic finetune").calls
    assert "--synthetic" in made[0] and after(made[0], "--multisubject_ckpt") == ["auto"]
    assert "--synthetic" not in made[1] and after(made[1], "--multisubject_ckpt") == ["synthetic"]
    for stages, run in (("pretrain", "pretrain"), ("finetune ridge", "ridge"), ("scratch", "scratch")):
        (words,) = call("score", FEATS="c", STAGES=stages).calls
        assert after(words, "--run") == [run]
    for stages in ("pretrain finetune", "finetune"):
        (words,) = call("score", FEATS="c", STAGES=stages).calls
        assert "--run" not in words  # the default
    assert names(call("score", STAGES="gnet").calls) == ["score_gnet.py"]
    assert names(call("score", FEATS="c", STAGES="ridge adapter").calls) == ["score_c.py"]
    assert call("score", STAGES="adapter").calls == []  # it decodes nothing


@pytest.mark.parametrize("name", RUNNING)
def test_subject_root_and_dry_run(call, name, tmp_path):
    for subj in ("3", "subj03"):
        for words in call(name, SUBJ=subj, DRY_RUN="1").calls:
            assert after(words, "--root") == [str(tmp_path)] and "--dry_run" in words
            assert ("--subj" not in words) if name in ("check_data", "download", "features") else (
                after(words, "--subj") == [subj])


def test_logging_to_wandb(call):
    for name in ("train", "score", "recon", "evaluate"):
        for value, wanted in (("1", True), ("0", False), ("", False)):
            assert all(("--wandb_log" in words) == wanted for words in call(name, WANDB_LOG=value).calls)


def test_flags_of_the_environment_stand_before_the_users(call):
    knobs = {f"{name}_FLAGS": f"--of {name.lower()}" for name in (
        "TRAIN", "PRETRAIN", "FINETUNE_Z", "TRAIN_GNET", "SCORE", "SCORE_GNET", "RECON", "EVALUATE", "FEATURES",
        "CHECK_DATA", "DOWNLOAD", "MAPS")}
    for name in RUNNING:
        made = call(name, "--mine", STAGES="pretrain finetune gnet", FEATS="c z", **knobs).calls
        found = [[after(words[i:], "--of")[0] for i, word in enumerate(words) if word == "--of"] for words in made]
        assert all(words[-1] == "--mine" for words in made)
        assert found == {"train": [["train", "pretrain"], ["train", "pretrain"], ["train"], ["train", "finetune_z"],
                                   ["train_gnet"]],
                         "score": [["score_gnet"], ["score"], ["score"]]}.get(name, [[name]])
    (words,) = call("recon", RECON_FLAGS="--a 1\n  --b  2").calls
    assert words[-4:] == ["--a", "1", "--b", "2"]


def test_the_demos_settings(call, tmp_path):
    """After `source demo/settings.sh`, from any folder, scripts get flags that their parsers take."""
    for name in ("features", "train", "score", "recon", "evaluate", "maps", "check_data"):
        command = f'source "{REPO}/demo/settings.sh"; bash "{REPO}/scripts/{name}.sh"'
        done = subprocess.run(["bash", "-c", f'{command} --dry_run --hidden_dim 8' if name in (
            "train", "score", "recon", "evaluate", "maps") else f"{command} --dry_run"], cwd=tmp_path, text=True,
            capture_output=True, check=False, env={"PATH": os.environ["PATH"], "PYTHON": os.environ.get("PYTHON", "")})
        assert done.returncode == 0, done.stderr
        assert f"--root {REPO}/demo" in done.stdout


@pytest.mark.parametrize("name", RUNNING)
def test_a_python_without_the_libraries_is_one_line(call, tmp_path, name):
    bare = tmp_path / "python"
    bare.write_text(f'#!/usr/bin/env bash\nexec "{sys.executable}" -S "$@"\n')
    bare.chmod(0o755)
    done = call(name, PYTHON=str(bare), FEATS="c", STAGES="finetune")
    (line,) = done.stderr.splitlines()
    assert done.returncode == 2 and line.startswith("error: ") and "bash scripts/setup.sh" in line


@pytest.mark.parametrize("script", SHOWING, ids=lambda file: file.stem)
def test_help_is_a_screen_and_runs_nothing(script, tmp_path):
    """Even where there is no Python, with knobs that are wrong."""
    (tmp_path / "bin").mkdir()
    for tool in ("bash", "sed", "dirname"):
        (tmp_path / "bin" / tool).symlink_to(subprocess.check_output(["which", tool], text=True).strip())
    for flag in ("--help", "-h"):
        done = subprocess.run(["bash", script, flag], env={"PATH": str(tmp_path / "bin"), "FEATS": "q"}, cwd=tmp_path,
                              capture_output=True, text=True, check=False)
        lines = done.stdout.splitlines()
        assert done.returncode == 0 and not done.stderr
        assert 3 < len(lines) <= 40 and max(map(len, lines)) <= 120
        assert not any("#" in line or "shellcheck" in line for line in lines)
        assert f"bash scripts/{script.relative_to(REPO / 'scripts')}" in done.stdout
    assert not list(tmp_path.glob("[!b]*"))
    if script.stem in RUNNING:
        work = script.read_text().partition("source ")[2]
        used = {"ROOT", "DRY_RUN", "PYTHON", *re.findall(r"\b(SUBJ|FEATS|LAUNCH|STAGES)\b", work)}
        used |= {"WANDB_LOG"} if "LOGGED" in work else set()
        assert set(re.findall(r"^  ([A-Z]+(?:_LOG|_RUN)?)=\S", done.stdout, re.MULTILINE)) >= used
        assert f"python3 src/{FIRST.get(script.stem, script.stem)}" in done.stdout and " --help" in done.stdout


@pytest.fixture
def side_by_side(tmp_path):
    """Start train.sh with JOBS=3, a program that takes its time in place of Python; returns the process and its log."""
    log, program = tmp_path / "log", tmp_path / "slow"
    program.write_text(f"""#!/usr/bin/env bash
name=$(basename "$1" .py) stage=finetune
[[ " $* " != *" --multi_subject "* ]] || stage=pretrain
trap 'echo "killed $name" >>{log}; exit 143' TERM
echo "start $stage $name $OMP_NUM_THREADS" >>{log}
own=SLOW_$name
for i in $(seq ${{!own:-${{SLOW:-5}}}}); do sleep 0.1; done
echo "end $stage $name" >>{log}
[[ $name != "${{FAILS:-}}" ]]
""")
    program.chmod(0o755)

    def start(**knobs):
        environment = {"PATH": os.environ["PATH"], "ROOT": str(tmp_path), "PYTHON": str(program), "JOBS": "3", **knobs}
        return subprocess.Popen(["bash", REPO / "scripts/train.sh"], env=environment, cwd=tmp_path, text=True,
                                stdout=subprocess.PIPE, stderr=subprocess.PIPE)

    return start, log


def test_jobs_run_side_by_side_stage_by_stage(side_by_side):
    start, log = side_by_side
    process = start()
    assert process.wait(30) == 0
    lines = [line.split() for line in log.read_text().splitlines()]
    for part, stage in ((lines[:6], "pretrain"), (lines[6:], "finetune")):
        assert [(word, when) for word, when, *_ in part] == [("start", stage)] * 3 + [("end", stage)] * 3
        assert {line[2] for line in part} == {"train_c", "train_z", "train_g"}
    assert {line[3] for line in lines if line[0] == "start"} == {str(-(-os.cpu_count() // 3))}


def test_a_job_begins_as_soon_as_there_is_room(side_by_side):
    start, log = side_by_side
    assert start(JOBS="2", STAGES="pretrain", SLOW_train_c="20", SLOW_train_z="2", SLOW_train_g="2").wait(30) == 0
    words = [" ".join(line.split()[::2][:2]) for line in log.read_text().splitlines()]
    assert words.index("end train_z") < words.index("start train_g") < words.index("end train_c") == 5


def test_a_job_that_fails_ends_the_script_when_the_others_are_done(side_by_side):
    start, log = side_by_side
    assert start(FAILS="train_z").wait(30) == 1
    assert log.read_text().count("end pretrain") == 3 and "finetune" not in log.read_text()


def test_a_script_that_is_stopped_stops_its_jobs(side_by_side):
    start, log = side_by_side
    process = start(SLOW="300")
    deadline = time.monotonic() + 20
    while not log.exists() or log.read_text().count("start") < 3:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.terminate()
    assert process.wait(20) == 143
    while log.read_text().count("killed") < 3:
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.mark.parametrize("jobs", ["0", "two", "-1"])
def test_jobs_is_a_number(call, jobs):
    done = call("train", JOBS=jobs)
    assert done.returncode == 2 and not done.calls and f"JOBS: {jobs} is not a number of jobs" in done.stderr
