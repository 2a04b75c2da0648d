"""Decoders of components: science that train_c.py, train_z.py and train_g.py share."""

from models import Decoder
from training.loop import fit
from training.objectives import ComponentObjective
from training.runs import open_component_run


def train_decoder(plan, name, feats, sizes, contrast=(), clip_scale=0.0, mixup_pct=0.0):
    """Train one network for all of `feats`, unless its folder holds it, finished.

    plan: settings.Plan; name: of the run, a feature or g. Data: responses of the plan's subjects and the components of
    the features of what they saw; plan.val_fraction of the images validate. Network: models.Decoder; sizes: what it
    takes beside the data's, {"hidden_dim": units, "n_blocks": blocks, "dropout": p}. contrast: features that retrieve.
    """
    opened = open_component_run(plan, name, feats)
    if opened is None:
        return
    run, components = opened
    model = Decoder(run.n_voxels, components={feat: known.k for feat, known in components.items()}, contrast=contrast,
                    **sizes)
    fit(run, model, ComponentObjective(components, clip_scale, mixup_pct), plan.loop)
