"""Make a workspace on W&B that shows what the scripts log: a section for each question, from training to evaluation.

    python src/wandb_workspace.py --dry_run                    # print its sections and keys; needs no network
    python src/wandb_workspace.py --entity my_team             # save it as a view of my_team's project neuraldiffuser
    python src/wandb_workspace.py --wandb_project other

Runs are grouped by subject and experiment (--wandb_group), and by stage. Each call saves a new view, and prints its
address; views that are there stay. Needs `bash scripts/setup.sh requirements-wandb.txt` and a login. What is where:
docs/wandb.md.
"""

import sys

import options
import utils

SCORED = ("network", "ridge", "scored")  # whose R2 of a feature score.sh logs
MEASURES = ("pixcorr", "ssim", "alexnet2_two_way", "alexnet5_two_way", "inception_two_way", "clip_two_way",
            "effnet_distance", "swav_distance")


def get_parser():
    parser = options.Parser(__doc__, dry_run_stops=False)
    parser.add_argument("--entity", metavar="NAME", help="user or team (your default one)")
    parser.add_argument("--wandb_project", default="neuraldiffuser", metavar="NAME")
    return parser


def main(argv=None):
    args = get_parser().parse_args(argv)
    try:
        import wandb_workspaces.workspaces  # noqa: F401
    except ImportError:
        raise utils.UserError("wandb-workspaces: not installed; bash scripts/setup.sh requirements-wandb.txt") from None
    if args.dry_run:
        for section in make_workspace(args.entity or "entity", args.wandb_project).sections:
            print(f"{section.name}: {', '.join(key for panel in section.panels for key in keys_of(panel))}")
        return
    import wandb

    if not wandb.login(prompt=False, verify=False):
        raise utils.UserError("not logged in to W&B, where the workspace is saved; run `wandb login`, without "
                              "WANDB_MODE=offline, or look at it with --dry_run")
    try:
        entity = args.entity or wandb.Api().default_entity
        print(f"workspace      {make_workspace(entity, args.wandb_project).save().url}")
    except Exception as error:  # W&B raises many types when there is no network, project or permission
        raise utils.UserError(f"--entity {args.entity or '(default)'} --wandb_project {args.wandb_project}: W&B did "
                              f"not save the workspace ({str(error).splitlines()[0]})") from None


def make_workspace(entity, project):
    """Return the wandb_workspaces.workspaces.Workspace; nothing is sent."""
    import wandb_workspaces.reports.v2 as wr
    import wandb_workspaces.workspaces as ws

    def curves(title, *keys, x="epoch"):
        return wr.LinePlot(title=title, x=x, y=list(keys))

    def bars(title, keys):
        return wr.BarPlot(title=title, metrics=list(keys))

    sections = {
        "Training": [
            curves("loss", "train/loss", "val/loss"), curves("squared error", "train/loss_mse", "val/loss_mse"),
            curves("loss of a step", "step/loss", x="step"), curves("learning rate", "step/lr", x="step"),
            curves("trials per second", "train/samples_per_s"), curves("waiting for data, %", "train/data_wait_pct")],
        "R2 on validation images, and the ridge's": [
            curves(feat, f"val/r2_{feat}", f"val/r2_{feat}_ridge") for feat in options.FEATURES],
        "Retrieval within a batch": [
            curves("brain to image", "train/fwd_pct_correct", "val/fwd_pct_correct"),
            curves("image to brain", "train/bwd_pct_correct", "val/bwd_pct_correct")],
        "GNet": [curves("median r of voxels", "val/r"), curves("as a share of the ceiling", "val/r_norm")],
        "R2 of what is scored": [
            bars(feat, (f"score/r2_{feat}_{what}" for what in SCORED)) for feat in options.FEATURES],
        "Pictures of the same images": [
            wr.MediaBrowser(title="a row for each run", media_keys=["recon/images"], grid_x_axis="index",
                            grid_y_axis="run")],
        "Evaluation": [
            *(bars(name, [f"eval/{name}_low", f"eval/{name}", f"eval/{name}_high"]) for name in MEASURES),
            wr.WeavePanelSummaryTable(table_name="eval/images"), wr.WeavePanelSummaryTable(table_name="eval/metrics"),
            wr.MediaBrowser(title="contact sheets", media_keys=["eval/contact_sheet"])],
    }
    return ws.Workspace(
        entity=entity, project=project, name="From fMRI to pictures",
        sections=[ws.Section(name=name, panels=panels, is_open=True) for name, panels in sections.items()],
        runset_settings=ws.RunsetSettings(groupby=[ws.Metric("Group"), ws.Metric("JobType")]))


def keys_of(panel):
    """List the keys that a panel shows."""
    for name in ("y", "metrics", "media_keys"):
        if hasattr(panel, name):
            return list(getattr(panel, name))
    return [panel.table_name]


if __name__ == "__main__":
    sys.exit(utils.run_cli(main))
