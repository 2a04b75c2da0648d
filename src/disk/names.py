"""Names on disk: where every file of the project lies, and what its runs, scores and pictures are called.

Only the standard library is imported here, as in utils.py. docs/data.md lists the names.
"""

from dataclasses import dataclass
from pathlib import Path

import options
from utils import UserError

LESIONS = {"voxels": "only", "without": "without"}  # {flag: what stands before its regions in a name}


@dataclass(frozen=True)
class Paths:
    """Every folder and file of the project, all hanging from one root."""

    root: Path
    data_path: Path
    roi_source: str | None = None  # "masks" or "volumes": where regions are read from; None: from all that is there

    @classmethod
    def from_args(cls, args):
        """From the parsed --root and --data_path; raises UserError when the root does not exist."""
        root = Path(args.root).expanduser().resolve()
        if not root.is_dir():
            raise UserError(f"--root {args.root}: no such folder; give the folder that holds nsddata/ and MindEyeV2/")
        data_path = Path(args.data_path).expanduser().resolve() if args.data_path else root / options.DATA_PATH
        return cls(root, data_path, getattr(args, "roi_source", None))

    def other(self, given, flag):
        """Return the Paths of another root, which a flag names; raises UserError when there is no such folder."""
        root = self.find(given)
        if not root.is_dir():
            raise UserError(f"{flag} {given}: no such folder; give the --root of other data")
        return Paths(root, root / options.DATA_PATH)

    def find(self, given):
        """Return the path that a flag names: from the current folder, or, where there is no such thing, from the root.

        The one rule for every flag that takes a file or a folder; an absolute path stays as it is, ~ is the home.
        """
        path = Path(given).expanduser()
        return path.resolve() if path.exists() else self.root / path

    def model(self, given):
        """Return the folder of a network that a flag names (`find`); a name that is no folder as it is, a hub id."""
        folder = self.find(given)
        return str(folder) if folder.is_dir() else given

    def as_recorded(self, path):
        """Return a path as configs keep it: from the root, if it lies there, so that a root can be moved."""
        return str(Path(path).relative_to(self.root)) if Path(path).is_relative_to(self.root) else str(path)

    @property
    def own_data(self):
        """What import_data.py says of the data that it put here; there is no such file beside NSD's."""
        return self.root / "own_data.json"

    def sessions(self, subj):
        """Count a subject's sessions (options.sessions_of); None where nothing says how many there are."""
        return options.sessions_of(subj, self.root, self.data_path)

    @property
    def stimuli(self):
        """Folder of NSD's stimuli, their captions and their features."""
        return self.root / "nsddata_stimuli/stimuli/nsd"

    @property
    def experiments(self):
        """Folder of the tables that say which subject saw which image when."""
        return self.root / "nsddata/experiments/nsd"

    @property
    def captions(self):
        """COCO's captions of the stimuli, {cocoId: [caption, ...]}."""
        return self.stimuli / "annotations/nsd_captions.json"

    @property
    def generated_captions(self):
        """Which of the captions a model wrote (img2feat.py --caption_model)."""
        return self.captions.with_name("nsd_captions_by.json")

    def feature(self, feat):
        """HDF5 file of a feature ('c', 'z', 'g_2', ...): one row per 73k image."""
        return self.stimuli / f"{feat}_all.hdf5"

    @property
    def synthetic(self):
        """Folder of NSD-synthetic's stimuli and of their features."""
        return self.root / "nsddata_stimuli/stimuli/nsdsynthetic"

    @property
    def synthetic_design(self):
        """Table that says which stimulus each trial of NSD-synthetic showed."""
        return self.root / "nsddata/experiments/nsdsynthetic/nsdsynthetic_expdesign.mat"

    def synthetic_betas(self, subj):
        """Folder of a subject's responses to NSD-synthetic, as volumes."""
        return self.root / "nsddata_betas/ppdata" / subj / "func1pt8mm/nsdsyntheticbetas_fithrf_GLMdenoise_RR"

    def synthetic_feature(self, feat, subj):
        """HDF5 file of a feature of NSD-synthetic's stimuli, some of which one subject alone saw."""
        return self.synthetic / f"{feat}_{subj}.hdf5"

    def components(self, feat):
        """HDF5 file of a feature's principal components, and of every image's coefficients."""
        return self.stimuli / f"{feat}_components.hdf5"

    def clusters(self, n):
        """HDF5 file that says which of n clusters each image is in."""
        return self.stimuli / f"clusters_{n}.hdf5"

    def betas(self, subj):
        """HDF5 file of a subject's single-trial responses."""
        return self.data_path / f"betas_all_{subj}_fp32_renorm.hdf5"

    def rois(self, subj):
        """Folder of NSD's ROI volumes."""
        return self.root / "nsddata/ppdata" / subj / "func1pt8mm/roi"

    def run(self, name):
        """Folder of a training run; `name` is `run_name`'s."""
        return self.root / "train_logs" / name

    def run_given(self, name):
        """Folder of a run that a flag names: one of train_logs, or, where there is none, a folder (`find`)."""
        return self.run(name) if self.run(name).exists() or not self.find(name).is_dir() else self.find(name)

    @property
    def scores_all(self):
        """Folder of all scores."""
        return self.root / "scores_all"

    @property
    def outputs_all(self):
        """Folder of all reconstructions."""
        return self.root / "outputs_all"

    def scores(self, subj, name, feat):
        """Folder of one feature's scores; `name` is `scores_name`'s."""
        folder = self.scores_all / subj / name
        return folder / f"Linear-{feat[2:]}" if feat.startswith("g_") else folder

    def scores_of(self, flags, feat):
        """Folder of one feature's scores that the flags of a score script (a dict) mean."""
        return self.scores(flags["subj"], scores_name(flags, feat), feat)

    def simulated(self, subj, num_sessions):
        """Folder of the responses of a subject that an encoding model of so many sessions simulated."""
        return self.scores_all / subj / f"gnet_{num_sessions}sess_synthetic"

    def maps(self, subj):
        """Folder of a subject's maps of the brain."""
        return self.outputs_all / subj / "maps"

    def transforms(self, subj):
        """Folder of NSD's transforms between a subject's spaces."""
        return self.root / "nsddata/ppdata" / subj / "transforms"

    def images(self, subj, method, guidance_scale, guidance_strength):
        """Folder of a set of reconstructions; those without guidance lie in 0/0."""
        if not guidance_scale * guidance_strength:
            guidance_scale = guidance_strength = 0
        return self.outputs_all / subj / method / f"{guidance_scale:g}" / f"{guidance_strength:g}"

    def images_of(self, flags):
        """Folder of the reconstructions that the flags of recon.py (a dict) mean, --outdir aside."""
        return self.images(flags["subj"], images_name(flags), flags["guidance_scale"], flags["guidance_strength"])


def run_name(stage, subj, feat, hidden_dim, num_sessions=40, tag="", hold_out=None):
    """Return the name of a training run.

    stage: 'pretrain' (all subjects but `subj`), 'synthetic' (simulated trials of `subj`), 'finetune' (`subj` alone,
    from one of these), 'scratch' or 'ridge' (the linear baseline, which has no hidden_dim), or 'ground_truth' (no run,
    but the true features of the images that `subj` saw). feat: 'gnet' with 'scratch' is the encoding model of `subj`,
    with 'pretrain' the one that all subjects share; 'adapter' is what conditions the diffusion on g as decoded from
    `subj`. tag: the user's own, to keep variants apart. hold_out: 'K/N', the cluster of images that it never sees.
    """
    if stage == "ground_truth":
        return f"ground_truth_{subj}_{feat}"
    if feat in ("gnet", "adapter"):
        return f"{feat}_" + ("multisubject" if stage == "pretrain" else subj) + (f"_{tag}" if tag else "")
    prefix = {"pretrain": "multisubject", "finetune": "pretrained"}.get(stage, stage)
    sessions = "" if stage == "pretrain" else f"_{num_sessions}sess"
    width = "" if stage == "ridge" else f"_{hidden_dim}" + ("_mlp" if feat == "c" else "")
    return f"{prefix}_{subj}{sessions}_ext1_{feat}{width}" + "".join(f"_{part}" for part in (*without(hold_out), tag)
                                                                     if part)


def without(hold_out):
    """Parts of a name that say which cluster of images was held out: ['without3of10'] of '3/10', [] of None."""
    return ["without" + hold_out.replace("/", "of")] if hold_out else []


def run_of(flags, feat):
    """Return the name of the run that a score script's flags (a dict) mean: --run STAGE[:SUBJ] and what names it."""
    stage, _, subj = flags["run"].partition(":")
    return run_name(stage, subj or flags["subj"], feat, flags["hidden_dim"], flags["num_sessions"], flags["tag"],
                    flags.get("hold_out"))


def runs_of(flags, feat):
    """List the runs that these flags may mean for a feature: of a g_k that of all layers together, then its own."""
    return [run_of(flags, name) for name in (["g", feat] if feat.startswith("g_") else [feat])]


def head_of(flags):
    """Say whose voxel encoder reads --subj: 'own', 'adapt' (a new one) or the subject it is borrowed from.

    Without --head: own where the run has one, else adapt. A pretraining run has everyone's but that of the subject it
    is named after; any other run has only that one.
    """
    stage, _, subj = flags["run"].partition(":")
    has_own = ((subj or flags["subj"]) == flags["subj"]) != (stage == "pretrain")
    return flags["head"] or ("own" if has_own else "adapt")


def scores_name(flags, feat):
    """Name a folder of scores: the run, then what sets these apart (another head, a null control, a lesion)."""
    head = head_of(flags)
    parts = [run_of(flags, feat)]
    parts += {"own": [], "adapt": [f"adapt{flags['num_sessions']}sess"]}.get(head, [f"head{head[-2:]}"])
    return "_".join([*parts, *_variant_of(flags)])


def scores_folders(feats, args):
    """List the folders that a score script writes, by its parsed flags."""
    return [Paths.from_args(args).scores_of(vars(args), feat) for feat in feats]


def images_name(flags):
    """Name the reconstructions that the flags of recon.py (a dict) mean: --method, then what they are made of."""
    ceiling = ["ground_truth"] if flags["run"] == "ground_truth" else []
    brain = ["gnet", flags["gnet_roi"], f"{flags['gnet_kappa']:g}"] if flags["use_gnet"] else []
    best = ["select", flags["select"]] if flags.get("select") else []
    adapter = ["adapter"] if flags.get("use_adapter") else []
    return "_".join([flags["method"], *adapter, *ceiling, *without(flags.get("hold_out")), *brain, *best,
                     *_variant_of(flags)])


def _variant_of(flags):
    """Parts of a name, each where it is not the default: the images, the trials of each, a null control, a lesion."""
    parts = {"test_split": "new_test", "repeats": "mean", "control": None}
    named = [flags[name] for name, default in parts.items() if flags[name] != default]
    return named + [f"{word}_{flags[name].replace(',', '+')}" for name, word in LESIONS.items() if flags.get(name)]
