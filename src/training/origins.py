"""What a result was made from: an identity of each of its inputs, and which of them are others now.

No file is read whole for it: components and features say what they are, of responses and stimuli a few rows are hashed,
a checkpoint lists the checksums of its tensors.
"""

from disk.files import archive_hash
from nsd.components import open_components, source_of
from nsd.rows import open_betas, open_feature, open_stimuli, sample_hash
from nsd.simulated import FILE, open_simulated

CLUSTERS = "clusters of images"  # of --hold_out, in what a run was made from


def inputs_there(paths, subjects=(), components=(), features=(), stimuli=False, runs=(), simulated=None):
    """Return {what it is, in words: its identity} of those inputs that are there.

    subjects: whose betas; components, features: names of features, by their components or by whole rows; runs:
    checkpoints of other runs, or None; simulated: whose simulated responses, from how many sessions, or None. Raises
    UserError for a file that is there and not readable.
    """
    found = {f"betas of {subj}": sample_hash(open_betas(paths, subj)) for subj in subjects if
             paths.betas(subj).exists()}
    found |= {f"components of {feat}": open_components(paths, feat).digest for feat in components if
              paths.components(feat).exists()}
    found |= {f"feature {feat}": source_of(open_feature(paths, feat).path) for feat in features if
              paths.feature(feat).exists()}
    if stimuli and paths.stimuli.joinpath("nsd_stimuli.hdf5").exists():
        found["stimuli"] = sample_hash(open_stimuli(paths))
    if simulated and (paths.simulated(*simulated) / FILE).exists():
        found["simulated responses"] = sample_hash(open_simulated(paths, *simulated))
    return found | {f"run {file.parent.name}": archive_hash(file) for file in runs if file is not None
                    and file.exists()}


def changed(recorded, there):
    """List, in words, which of the inputs that are there are not those that were recorded (inputs_there, both).

    What is not there any more cannot be compared, and is not listed.
    """
    return [what if what in recorded else f"{what} (not used then)" for what, identity in there.items()
            if recorded.get(what) != identity]
