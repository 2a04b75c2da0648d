"""What lies on disk where the flags led to nothing, and which flags lead there: what errors name.

The reverse of disk.names, which makes names of flags (dicts, as it takes them); like it of the standard library only.
"""

import re

from disk.names import LESIONS, head_of, images_name, run_name, runs_of

AT_MOST = 8  # that an error names
STAGES = {"multisubject": "pretrain", "pretrained": "finetune", "synthetic": "synthetic", "scratch": "scratch",
          "ridge": "ridge"}
WITHOUT = r"(?:_without(?P<hold_out>\d+of\d+))?"
RUN = (rf"(?P<prefix>{'|'.join(STAGES)})_(?P<of>subj\d\d)(?:_(?P<num_sessions>\d+)sess)?_ext1_" "{feat}"
       r"(?:_(?P<hidden_dim>\d+))?(?:_mlp)?" + WITHOUT + r"(?:_(?P<tag>.+?))??")
CEILING = r"(?P<ceiling>ground_truth)_(?P<seen_by>subj\d\d)_{feat}"
HEAD = r"(?:_adapt(?P<adapted>\d+)sess|_head(?P<lent>\d\d))?"
VARIANT = (r"(?:_(?P<test_split>test|val|synthetic))?(?:_(?P<repeats>single))?"
           r"(?:_(?P<control>shuffle|noise|mean|bottleneck\d+))?"
           r"(?:_only_(?P<voxels>[A-Za-z0-9_+]+)|_without_(?P<without>[A-Za-z0-9_+]+))?")
PICTURES = (r"(?P<method>.+?)(?P<adapter>_adapter)?(?P<ceiling>_ground_truth)?" + WITHOUT +
            r"(?:_gnet_(?P<gnet_roi>[A-Za-z0-9]+|higher_vis|nsd_general)_(?P<gnet_kappa>[\d.e+-]+))?"
            r"(?:_select_(?P<select>g|gnet))?" + VARIANT)
DEFAULTS = {"test_split": "new_test", "repeats": "mean", "control": None}


def how_to_train(paths, flags, feat):
    """Return the command that trains the run which flags (--run of --subj, ...) mean, its knobs in front."""
    stage, _, subj = flags["run"].partition(":")
    subj = subj or flags["subj"]
    stages = '"pretrain finetune"' if stage == "finetune" else stage
    named = [] if stage == "ridge" else [f"--hidden_dim {flags['hidden_dim']}"]
    if stage != "pretrain" and flags["num_sessions"] != paths.sessions(subj):
        named.append(f"--num_sessions {flags['num_sessions']}")
    named += [f"--tag {flags['tag']}"] if flags["tag"] else []
    named += [f"--hold_out {flags['hold_out']}"] if flags.get("hold_out") else []
    return " ".join([f"SUBJ={int(subj[-2:])} STAGES={stages} FEATS={feat} bash scripts/train.sh", *named])


def how_to_score(paths, flags, feat):
    """Say how the scores of a feature that flags mean are made: the command, and first that of a run that lacks."""
    command = [f"SUBJ={int(flags['subj'][-2:])} FEATS={feat} bash scripts/score.sh"]
    run, ceiling = own_run(flags), flags["run"] == "ground_truth"
    command += [f"--run {as_written(run)}"] if run != "finetune" else []
    command += [f"--hidden_dim {flags['hidden_dim']}"] if not ceiling and not run.startswith("ridge") else []
    if flags["num_sessions"] != paths.sessions(flags["subj"]):
        command.append(f"--num_sessions {flags['num_sessions']}")
    command += [f"--head {flags['head'].removeprefix('subj0')}"] if flags["head"] else []
    for flag, default in {"tag": "", "hold_out": None, **DEFAULTS, **dict.fromkeys(LESIONS)}.items():
        command += [f"--{flag} {flags[flag]}"] if flags.get(flag, default) != default else []
    scoring = f"score {feat} ({' '.join(command)})"
    if ceiling or any((paths.run(name) / "last.pth").exists() for name in runs_of(flags, feat)):
        return scoring
    return f"train it first ({how_to_train(paths, flags, feat)}), then {scoring}"


def runs_like(paths, flags, feat, stage=None):
    """Say which runs of a feature there are, and the flags that lead to each; '' where there are none.

    Of a g_k also those of all layers together. stage: "pretrain" or "synthetic", for those that --multisubject_ckpt
    takes alone.
    """
    feat = rf"(?:{feat}|g(?!_\d{{1,2}}_))" if feat.startswith("g_") else feat
    found = []
    for file in paths.run("").glob("*/last.pth"):
        name = re.fullmatch(RUN.replace("{feat}", feat), file.parent.name)
        if name and stage in (None, STAGES[name["prefix"]]):
            words = differences(paths, flags, run_flags(name, flags["subj"]))
            other = stage is not None and any(word.startswith("--run ") for word in words)  # of another subject
            found.append((file.parent.name, [f"--multisubject_ckpt {file.parent.name}"] if other else words))
    return listed(found)


def widths_there(paths, stage, subj, feat, num_sessions, tag, hold_out=None):
    """List the --hidden_dim of the runs of a stage that there are, named by the other arguments, ascending."""
    found = []
    for file in paths.run("").glob(f"*_{subj}_*/last.pth"):
        name = re.fullmatch(RUN.replace("{feat}", feat), file.parent.name)
        if name and name["hidden_dim"]:
            width = int(name["hidden_dim"])
            if file.parent.name == run_name(stage, subj, feat, width, num_sessions, tag, hold_out):
                found.append(width)
    return sorted(found)


def scores_like(paths, flags, feat):
    """Say which scores of a feature there are, of any subject, and the flags that lead to each; '' for none."""
    pattern = f"(?:{RUN}|{CEILING}){HEAD}{VARIANT}".replace("{feat}", feat)
    below = f"Linear-{feat[2:]}/" if feat.startswith("g_") else ""
    found = []
    for file in paths.scores_all.glob(f"subj*/*/{below}nsdgeneral.npy"):
        folder = file.parents[1] if below else file.parent
        name, subj = re.fullmatch(pattern, folder.name), folder.parent.name
        if name:
            own = subj == flags["subj"]
            found.append((folder.name if own else f"{subj}/{folder.name}", differences(paths, flags, {
                "subj": subj, **run_flags(name, subj), "head": head_in(name), **variant_in(name)})))
    return listed(found)


def pictures_like(paths, flags):
    """Say which reconstructions there are, and the flags of evaluate.py that lead to each; '' where there are none."""
    found = []
    for file in paths.outputs_all.glob("subj*/*/*/*/index.csv"):
        subj, method, scale, strength = file.parts[-5:-1]
        name = re.fullmatch(PICTURES, method)
        try:
            scale, strength = float(scale), float(strength)
        except ValueError:
            continue
        of_set = {"subj": subj, "method": name["method"], "run": "ground_truth" if name["ceiling"] else "finetune",
                  "hold_out": held_out_in(name), **variant_in(name), "use_adapter": name["adapter"] is not None,
                  "use_gnet": name["gnet_roi"] is not None, "gnet_roi": name["gnet_roi"],
                  "gnet_kappa": float(name["gnet_kappa"] or 0), "select": name["select"]}
        assert images_name(of_set) == method, f"{method}: {of_set}"
        words = differences(paths, {**flags, "run": flags["run"] if flags["run"] == "ground_truth" else "finetune"},
                            of_set)
        if flags["guidance_scale"] != scale:
            words.append(f"--guidance_scale {scale:g}")
        if scale and flags["guidance_strength"] != strength:
            words.append(f"--guidance_strength {strength:g}")
        found.append(("/".join(file.parts[(-4 if subj == flags["subj"] else -5):-1]), words))
    return listed(found)


def encoders_there(paths):
    """Say which brain encoding models there are, and the flag that names each; '' where there are none."""
    return listed([(file.parent.name, [f"--gnet_run {file.parent.name}"])
                   for file in paths.run("").glob("gnet_*/best.pth")])


def listed(found):
    """Join names and the flags that lead there, [(name, [flag])], the fewest flags first."""
    found = sorted(found, key=lambda item: (len(item[1]), item[0]))
    words = [f"{name} ({' '.join(flags)})" if flags else name for name, flags in found[:AT_MOST]]
    more = [f"{len(found) - AT_MOST} more"] if len(found) > AT_MOST else []
    return "there are: " + ", ".join(words + more) if words else ""


# --- from names to flags ------------------------------------------------------------------------------------------


def run_flags(name, subj):
    """Return the flags that the match of a run's name stands for, when `subj` is decoded: those that it determines."""
    if name.groupdict().get("ceiling"):
        return {"run": "ground_truth"}
    found = {"run": STAGES[name["prefix"]] + (f":{name['of']}" if name["of"] != subj else ""), "tag": name["tag"] or "",
             "hold_out": held_out_in(name)}
    sessions = name["num_sessions"] or name.groupdict().get("adapted")
    found |= {"num_sessions": int(sessions)} if sessions else {}
    return found | ({"hidden_dim": int(name["hidden_dim"])} if name["hidden_dim"] else {})


def head_in(name):
    """Return the voxel encoder that the match of a scores' name stands for, as disk.names.head_of does."""
    return f"subj{name['lent']}" if name["lent"] else "adapt" if name["adapted"] else "own"


def held_out_in(name):
    """Return the --hold_out that the match of a name stands for."""
    return name["hold_out"] and name["hold_out"].replace("of", "/")


def variant_in(name):
    lesion = {flag: name[flag] and name[flag].replace("+", ",") for flag in LESIONS}
    return {flag: name[flag] or default for flag, default in DEFAULTS.items()} | lesion


def differences(paths, wanted, found):
    """List the flags that `wanted` must be changed by to mean what `found` does, as they are written."""
    words, subj = [], found.get("subj", wanted["subj"])
    if subj != wanted["subj"]:
        words.append(f"--subj {int(subj[-2:])}")
    if found["run"] != own_run(wanted):
        words.append(f"--run {as_written(found['run'])}")
    if "head" in found and found["run"] != "ground_truth":
        if head_of({**wanted, "subj": subj, "run": found["run"]}) != found["head"]:
            words.append(f"--head {found['head'].removeprefix('subj0')}")
    is_all = wanted.get("num_sessions") == paths.sessions(wanted["subj"])
    all_of = paths.sessions(subj) if is_all else wanted.get("num_sessions")
    if found.get("num_sessions", all_of) != all_of:
        words.append(f"--num_sessions {found['num_sessions']}")
    if found.get("use_gnet"):
        names = ("gnet_roi", "gnet_kappa")
        if not (wanted["use_gnet"] and all(wanted[name] == found[name] for name in names)):
            words.append(f"--use_gnet --gnet_roi {found['gnet_roi']} --gnet_kappa {found['gnet_kappa']:g}")
    elif wanted.get("use_gnet") and "use_gnet" in found:
        words.append("without --use_gnet")
    if "use_adapter" in found and found["use_adapter"] != wanted.get("use_adapter", False):
        words.append("--use_adapter" if found["use_adapter"] else "without --use_adapter")
    for flag in ("hidden_dim", "method", "select", "tag", "hold_out", "test_split", "repeats", "control", *LESIONS):
        if flag in found and found[flag] != wanted.get(flag):
            words.append(f"--{flag} {found[flag]}" if found[flag] else f"without --{flag}")
    return words


def as_written(run):
    """'pretrain:subj01' -> 'pretrain:1'."""
    stage, colon, subj = run.partition(":")
    return stage + (f":{int(subj[-2:])}" if colon else "")


def own_run(flags):
    """Return --run as it is written shortest: the subject only where it is another than --subj."""
    stage, _, subj = flags["run"].partition(":")
    return flags["run"] if subj and subj != flags["subj"] else stage
