"""Flags out of range, and flags that do not go together: one line that says what to do, and nothing changed."""

import convert_gnet
import evaluate
import map_brain
import recon
import score_c
import score_g
import score_gnet
import score_z
import train_adapter
import train_c
import train_g
import train_gnet
import train_z
from damages import (
    both,
    sd_without_weights,
    target,
    text,
    volumes,
    whole,
    without,
)
from tiny_brain import RUN as GNET
from tiny_brain import V
from whole_world import BETAS, FLAGS, IMAGES, C, assert_refused, mistakes

GUIDED = ["--use_gnet", "--gnet_roi", "V1", "--method", "brain"]
CASES = [  # script, what is broken, how, flags, words of the line: flag or file, found, wanted or what to do
    # flags out of range
    (train_c, "--batch_size 0", whole, ["--batch_size", 0], ("--batch_size 0", "at least 1")),
    (train_c, "--batch_size -3", whole, ["--batch_size", -3], ("--batch_size -3", "at least 1")),
    (train_c, "--num_epochs 0", whole, ["--num_epochs", 0], ("--num_epochs 0", "at least 1")),
    (train_c, "--max_lr nan", whole, ["--max_lr", "nan"], ("--max_lr nan", "wanted")),
    (train_c, "--max_lr -1", whole, ["--max_lr", -1], ("--max_lr -1", "wanted")),
    (train_c, "--max_lr inf", whole, ["--max_lr", "inf"], ("--max_lr inf", "wanted")),
    (train_c, "--clip_scale nan", whole, ["--clip_scale", "nan"], ("--clip_scale nan", "wanted")),
    (train_c, "--prior_scale -1", whole, ["--prior_scale", -1], ("--prior_scale -1", "wanted")),
    (train_c, "--val_fraction 1.5", whole, ["--val_fraction", 1.5], ("--val_fraction 1.5", "from 0 to 1")),
    (train_c, "--mixup_pct nan", whole, ["--mixup_pct", "nan"], ("--mixup_pct nan", "from 0 to 1")),
    (train_c, "--val_fraction 1", whole, ["--val_fraction", 1], ("--val_fraction", "no trials to train on")),
    (train_c, "--num_sessions 0", whole, ["--num_sessions", 0], ("--num_sessions 0", "1 to 3")),
    (train_c, "--num_sessions 99", whole, ["--num_sessions", 99], ("--num_sessions 99", "1 to 3")),
    (train_c, "--seed -1", whole, ["--seed", -1], ("--seed", "'-1'", "from 0")),
    (train_c, "--seed 1.5", whole, ["--seed", 1.5], ("--seed", "'1.5'", "whole number")),
    (train_c, "--num_workers -1", whole, ["--num_workers", -1], ("--num_workers -1", "0 or more")),
    (train_c, "--device cuda", whole, ["--device", "cuda"], ("--device cuda", "no CUDA device", "--device cpu")),
    (train_z, "--decoder_channels 30", whole, ["--decoder_channels", 30, 32, 32], ("--decoder_channels", "of 32")),
    (train_gnet, "--l1 inf", whole, ["--l1", "inf"], ("--l1 inf", "wanted")),
    (train_gnet, "--trunk_width 0", whole, ["--trunk_width", 0], ("--trunk_width 0", "at least 1")),
    (train_adapter, "--batch_size 0", whole, ["--batch_size", 0], ("--batch_size 0", "at least 1")),
    (train_adapter, "--sd_model nowhere", whole, ["--sd_model", "nowhere"], ("--sd_model nowhere", "give")),
    (train_adapter, "--feats c", whole, ["--feats", "c"], ("--feats", "'c'", "g_2")),
    (score_c, "--batch_size 0", whole, ["--batch_size", 0], ("--batch_size 0", "at least 1")),
    (score_c, "--prior_steps 0", whole, ["--prior_steps", 0], ("--prior_steps 0", "at least 1")),
    (score_c, "--prior_steps 1000", whole, ["--prior_steps", 1000], ("--prior_steps 1000", "at most")),
    (score_c, "--num_sessions 0", whole, ["--num_sessions", 0, "--run", "pretrain"], ("--num_sessions 0",)),
    (score_c, "--head of an unknown subject", whole, ["--head", 100], ("--head", "'100'", "1..99")),
    (score_c, "--head without an encoder", whole, ["--head", 5], ("--head subj05", "subj01", "adapt")),
    (score_g, "--feat g_3", whole, ["--feat", "g_3"], ("--feat", "'g_3'", "g_2")),
    (score_gnet, "--batch_size -1", whole, ["--batch_size", -1], ("--batch_size -1", "at least 1")),
    (score_gnet, "--ids out of range", whole, ["--ids", "0-99"], ("--ids 99", "0..23")),
    (score_gnet, "--ids not numbers", whole, ["--ids", "a-b"], ("--ids", "'a-b'", "0-99")),
    (score_gnet, "--ids huge", whole, ["--ids", "0-99999999999999"], ("--ids", "0..23")),
    (score_gnet, "--images a file", whole, ["--images", BETAS], ("--images", "folder")),
    (score_gnet, "--images empty", lambda w: (w.root / "none").mkdir(), ["--images", "none"],
     ("--images", "no picture")),
    (score_gnet, "--images not pictures", text("mine/a.png", "png"), ["--images", "mine"], ("a.png", "not a readable")),
    (recon, "--guidance_scale nan", whole, ["--guidance_scale", "nan"], ("--guidance_scale nan", "from 0")),
    (recon, "--guidance_scale inf", whole, ["--guidance_scale", "inf"], ("--guidance_scale inf", "from 0")),
    (recon, "--guidance_strength 1.5", whole, ["--guidance_strength", 1.5], ("--guidance_strength 1.5", "from 0 to 1")),
    (recon, "--strength nan", whole, ["--strength", "nan"], ("--strength nan", "from 0 to 1")),
    (recon, "--guidance_repeats 0", whole, ["--guidance_repeats", 0], ("--guidance_repeats 0", "at least 1")),
    (recon, "--guidance_draws -1", whole, ["--guidance_draws", -1], ("--guidance_draws -1", "from 0")),
    (recon, "dpm goes back", whole, ["--guidance_repeats", 2, "--solver", "dpm"],
     ("--guidance_repeats 2", "use --solver")),
    (recon, "--num_samples 0", whole, ["--num_samples", 0], ("--num_samples 0", "at least 1")),
    (recon, "--batch_size -2", whole, ["--batch_size", -2], ("--batch_size -2", "at least 1")),
    (recon, "--resolution 0", whole, ["--resolution", 0, "--overwrite"], ("--resolution 0", "wanted")),
    (recon, "--ids out of range", whole, ["--ids", 4], ("--ids 4", "not a test image", "3..20")),
    (recon, "--ids not numbers", whole, ["--ids", "four"], ("--ids", "'four'")),
    (recon, "--method leads elsewhere", whole, ["--method", "../../x"], ("--method", "'../../x'", "file name")),
    (recon, "--sd_model without weights", lambda w: (w.root / "sd").mkdir(), ["--sd_model", "ROOT/sd", "--overwrite"],
     ("--sd_model", "has no vae", "give")),
    (recon, "--sd_model empty weights", sd_without_weights, ["--sd_model", "ROOT/sd", "--overwrite"],
     ("--sd_model", "could not be loaded", "give")),
    (recon, "--clip_model without weights", lambda w: (w.root / "clip").mkdir(),
     ["--clip_model", "ROOT/clip", "--overwrite"], ("--clip_model", "no CLIP vision model", "give")),
    (recon, "--device cuda", whole, ["--device", "cuda"], ("--device cuda", "no CUDA device", "--device cpu")),
    (evaluate, "--batch_size 0", whole, ["--batch_size", 0], ("--batch_size 0", "at least 1")),
    (evaluate, "--guidance_scale nan", whole, ["--guidance_scale", "nan"], ("nan", "not found")),
    (evaluate, "--retrieval_feat x", whole, ["--retrieval_feat", "x"], ("--retrieval_feat", "'x'", "wanted c, z")),
    # combinations
    (train_c, "two stages", whole, ["--multi_subject", "--multisubject_ckpt", "auto"], ("--multi_subject and", "two")),
    (train_c, "ridge has no pretraining", whole, ["--model", "ridge", "--multi_subject"], ("--model ridge", "leave")),
    (train_c, "pretraining on itself", whole, ["--multi_subject", "--pretrain_subjects", 1],
     ("--pretrain_subjects subj01", "wanted some of subj02")),
    (train_c, "subject without data", whole, ["--subj", 7], ("betas of subj07", "not found", "--subj")),
    (score_c, "lesion of an unknown region", whole, ["--voxels", "V1,V9"],
     ("--voxels V1,V9", "no region V9 of subj01", "wanted some of V1, V2")),
    (score_g, "lesion of everything", whole, ["--without", "nsd_general"], ("--without nsd_general", "leaves none")),
    (score_c, "no regions", whole, ["--voxels", "V1 V2"], ("--voxels", "'V1 V2'", "V1,V2")),
    (score_c, "both kinds of lesion", whole, ["--voxels", "V1", "--without", "V2"], ("--without", "--voxels")),
    (score_c, "lesion of numbers", whole, ["--voxels", "V1", "--control", "bottleneck2"],
     ("--control bottleneck2", "--voxels", "leave one")),
    (score_c, "truth of a lesion", whole, ["--ground_truth", "--voxels", "V1"], ("--voxels", "--ground_truth")),
    (recon, "lesion without scores", whole, ["--without", "V1"], ("scores of c not found", "--without V1")),
    (map_brain, "maps of no decoder and no GNet", both(volumes(), without(f"train_logs/{GNET}")), ["--feats", "none"],
     ("nothing to map", "gnet_subj01 was not trained")),
    (map_brain, "maps of the truth", volumes(), ["--run", "ground_truth"], ("--run ground_truth", "reads no voxel")),
    (map_brain, "maps of a run that is not there", volumes(), ["--tag", "no"], ("--tag", "not found", "train it")),
    (score_c, "truth of a control", whole, ["--ground_truth", "--control", "mean"],
     ("--control mean", "--ground_truth")),
    (score_c, "own head of a pretraining", whole, ["--run", "pretrain", "--head", "own"], ("subj02", "wanted subj01")),
    (score_gnet, "ids and images", whole, ["--ids", 1, "--images", "x"], ("--images", "--ids")),
    (recon, "--use_gnet without a run", without(f"train_logs/{GNET}"), GUIDED,
     ("--gnet_run", "not found", "train one")),
    (recon, "--use_gnet, nothing guides", whole, [*GUIDED, "--guidance_scale", 0], ("--use_gnet", "nothing", "give")),
    (recon, "--gnet_roi unknown", whole, [*GUIDED, "--gnet_roi", "V9"], ("--gnet_roi V9", "wanted V1")),
    (recon, "--gnet_roi too small", whole, [*GUIDED, "--gnet_roi", "V3"], ("--gnet_roi V3", "at least 20")),
    (recon, "--gnet_kappa nan", whole, [*GUIDED, "--gnet_kappa", "nan"], ("--gnet_kappa nan", "from 0")),
    (recon, "--gnet_alpha 2", whole, [*GUIDED, "--gnet_alpha", 2], ("--gnet_alpha 2", "from 0 to 1")),
    (recon, "target missing", whole, [*GUIDED, "--target_fmri_npy", "ROOT/x.npy"], ("--target_fmri_npy", "not found")),
    (recon, "target of another width", target((4, V - 1)), [*GUIDED, "--target_fmri_npy", "ROOT/t.npy"],
     ("--target_fmri_npy", f"{V - 1} voxels", f"the {V} of")),
    (recon, "target of other ids", target((4, V), ids=[0, 1, 2, 3]), [*GUIDED, "--target_fmri_npy", "ROOT/t.npy"],
     ("--target_fmri_npy", "no row for image id", "give a row")),
    (recon, "target of words", target((4, V), "<U3"), [*GUIDED, "--target_fmri_npy", "ROOT/t.npy"],
     ("--target_fmri_npy", "<U3", "give responses")),
    (evaluate, "--subjects of one folder", whole, ["--subjects", 1, "--images", IMAGES], ("--subjects", "leave out")),
    # whatever the script
    *((script, "unknown flag", whole, ["--nonsense", 1], ("--nonsense", "--help")) for script in FLAGS),
    (train_c, "abbreviated flag", whole, ["--batch", 3], ("--batch", "--help")),
    (recon, "abbreviated flag", whole, ["--guidance_sc", 3], ("--guidance_sc", "--help")),
    (evaluate, "a word too many", whole, ["x"], ("x", "--help")),
    *((script, "--root nowhere", whole, ["--root", "/nowhere"], ("--root /nowhere", "no such folder", "give"))
      for script in FLAGS),
    *((script, "--data_path a file", whole, ["--data_path", f"ROOT/{C}"], ("c_all.hdf5", "not found"))
      for script in (train_c, train_g, train_z, train_gnet, train_adapter, score_c, score_g, score_z, score_gnet,
                     convert_gnet)),
]


@mistakes(CASES)
def test_a_mistake_gives_one_line_and_changes_nothing(case, whole_world, monkeypatch, capsys):
    assert_refused(case, whole_world, monkeypatch, capsys)
