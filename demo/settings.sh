# The demo world's settings, which scripts/demo.sh reads, too. After
#
#   source demo/settings.sh
#
# the scripts of this shell work on the demo world (`bash scripts/recon.sh --limit 5`, ...), and your flags override
# these. A new shell leaves it. What stands here is for a small world; everything else is the paper's default.
# shellcheck shell=bash
ROOT=$(cd "$(dirname "${BASH_SOURCE[0]:-$0}")" && pwd) # folders below are looked up from there
export ROOT SUBJ=1 HF_HUB_OFFLINE=1

# features.sh: the models that stand in for Stable Diffusion and CLIP
export FEATURES_FLAGS="--sd_model models/sd --clip_model models/clip --components 256"
export CHECK_DATA_FLAGS="--sd_model models/sd --clip_model models/clip --guidance_decoder models/taesd --eval_clip models/clip"

# train.sh: the decoders' width; a small world is read without further processes
export TRAIN_FLAGS="--hidden_dim 512 --num_workers 0"
export TRAIN_GNET_FLAGS="--num_epochs 8 --batch_size 32 --max_lr 3e-3"
export TRAIN_ADAPTER_FLAGS="--sd_model models/sd --num_epochs 20 --batch_size 48 --max_lr 1e-3 --num_workers 0"

# score.sh: which decoders
export SCORE_FLAGS="--hidden_dim 512"

# recon.sh: steps, CFG and where z starts were chosen on this world's validation images; guidance is the default
export RECON_FLAGS="--hidden_dim 512 --sd_model models/sd --clip_model models/clip --guidance_decoder models/taesd
    --num_inference_steps 12 --cfg_scale 5 --strength 0.5"

# maps.sh: whose decoders
export MAPS_FLAGS="--hidden_dim 512"

# evaluate.sh: the pictures of recon.sh, and the CLIP that judges
export EVALUATE_FLAGS="--hidden_dim 512 --eval_clip models/clip"
