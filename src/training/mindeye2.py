"""c and the g_k with MindEye2's networks: science that train_c.py and train_g.py share."""

from models import BrainModel
from training.loop import fit
from training.runs import open_run


def train_tokens(plan, feat, sizes, objective):
    """Train the network of one feature of tokens (T, D), c or a g_k, unless its folder holds it, finished.

    Data: single trials of the plan's subjects and the feature of the images they saw; plan.val_fraction of the images
    validate. Network: models.BrainModel, its prior standardised to the training images' targets. sizes: what
    BrainModel takes beside the data's, {"hidden_dim": units, "n_blocks": blocks, ...}.
    """
    run = open_run(plan, feat)
    if run is None:
        return
    tokens, width = run.shapes["target"]
    model = BrainModel(run.n_voxels, tokens=tokens, width=width, **sizes)
    model.standardise(*run.target_statistics)
    fit(run, model, objective, plan.loop)
