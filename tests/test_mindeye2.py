"""--model mindeye2: the published budget, said by --help, and scores that are the prior's mean."""

import pytest

import score_c
import score_g
import score_z
import train_c
import train_g
import train_gnet
import train_z

# MindEye2's README: its commands to pretrain and to fine-tune; an epoch of pretraining there is 30,000 trials
PUBLISHED = {"max_lr": 3e-4, "mixup_pct": 0.33, "prior_scale": 30, "clip_scale": 1, "n_blocks": 4, "hidden_dim": 1024}


@pytest.mark.parametrize(("stage", "batch_size", "num_epochs"), [
    (["--multi_subject"], 42, 29), (["--multisubject_ckpt", "a_run_that_is_not_there"], 24, 150), ([], 24, 150)])
@pytest.mark.parametrize("script", [train_c, train_g, train_z])
def test_the_defaults_are_those_that_were_published(tmp_path, script, stage, batch_size, num_epochs):
    flags = ["--root", str(tmp_path), "--model", "mindeye2", *stage]
    found = vars(script.get_parser().parse_args(flags))
    wanted = PUBLISHED | {"batch_size": batch_size, "num_epochs": num_epochs}
    wanted["clip_scale"] = 0.1 if script is train_z else 1
    assert {name: found[name] for name in wanted} == wanted
    given = script.get_parser().parse_args([*flags, "--num_epochs", "7", "--batch_size", "8"])
    assert (given.num_epochs, given.batch_size) == (7, 8)
    said = " ".join(script.get_parser().format_help().split())
    for phrase in ("mindeye2: 24, pretraining 42)", "mindeye2: 150, pretraining 29)",
                   f"mindeye2: {wanted['clip_scale']})"):
        assert phrase in said


def test_gnet_keeps_its_own_defaults(tmp_path):
    args = train_gnet.get_parser().parse_args(["--root", str(tmp_path)])
    assert (args.batch_size, args.num_epochs, args.max_lr) == (42, 30, 1e-3)


@pytest.mark.parametrize("script", [score_c, score_g, score_z])
def test_scores_are_the_priors_mean(tmp_path, script):
    assert script.get_parser().parse_args(["--root", str(tmp_path)]).prior_steps == 1
