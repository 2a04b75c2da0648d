"""Which files a plan needs, and where they come from: NSD's bucket, the Hugging Face hub, COCO.

A group of files (`GROUPS`) has one name in download.py --what, in check_data.py's table and its repair commands.
"""

from typing import NamedTuple

import options

DOWNLOAD = "download it (bash scripts/download.sh)"  # what to do about a file that is not there
HUB_DATA = "pscotti/mindeyev2"  # MindEye2's prepared NSD, a data set on the hub
ONLY_CHECKED = {"COCO_73k_subj_indices.hdf5"}  # files of it that no stage reads, only check_data.py
NSD_URL = "https://natural-scenes-dataset.s3.amazonaws.com"
COCO_URL = "https://s3.amazonaws.com/images.cocodataset.org"  # as images.cocodataset.org it has no certificate
COCO_CAPTIONS = "annotations/annotations_trainval2017.zip"
SD_MODEL = "CompVis/stable-diffusion-v1-4"
TAESD = "madebyollin/taesd"  # a decoder of its latents, of a twentieth of the work
CLIP_MODEL, EVAL_CLIP = "openai/clip-vit-base-patch32", "openai/clip-vit-large-patch14"
# of a model's repository, what from_pretrained reads (not the same weights again in other formats)
SD_FILES = ["model_index.json", "scheduler/*.json", "tokenizer/*", "text_encoder/config.json", "unet/config.json",
            "vae/config.json", "text_encoder/model.safetensors", "unet/diffusion_pytorch_model.safetensors",
            "vae/diffusion_pytorch_model.safetensors"]
SD_WEIGHTS = {  # the same as PyTorch's pickles, which some repositories have instead
    "text_encoder/model.safetensors": "text_encoder/pytorch_model.bin",
    "unet/diffusion_pytorch_model.safetensors": "unet/diffusion_pytorch_model.bin",
    "vae/diffusion_pytorch_model.safetensors": "vae/diffusion_pytorch_model.bin"}
TAESD_FILES = ["config.json", "diffusion_pytorch_model.safetensors"]
CLIP_FILES = ["config.json", "preprocessor_config.json", "model.safetensors", "pytorch_model.bin"]

GROUPS = {  # name: what it is
    "design": "which subject saw which image in which trial, and which COCO picture an image is",
    "stimuli": "the 73,000 images",
    "captions": "COCO's captions of them",
    "betas": "responses, trial by trial",
    "trials": "shards: the images of training and test trials",
    "masks": "regions of interest over the betas' voxels",
    "rois": "NSD's own volumes of them, to check the masks against",
    "gnet": "the published brain encoding model",
    "synthetic": "NSD-synthetic: stimuli of another kind, and responses to them",
    "imagery": "NSD-Imagery: responses to what was imagined (no test set yet)",
    "sd": "Stable Diffusion v1.4",
    "taesd": "a small decoder of its latents, for guidance",
    "clip": "CLIP ViT-B/32, for g",
    "eval_clip": "CLIP ViT-L/14, the judge",
}
DEFAULT_GROUPS = [group for group in GROUPS if group not in ("gnet", "synthetic", "imagery")]
# which groups a stage of the pipeline reads
STAGES = {
    "features": ["design", "stimuli", "captions", "sd", "clip"],
    "train": ["design", "betas", "trials"],
    "gnet": ["design", "stimuli", "betas", "trials", "masks", "rois"],
    "score": ["design", "betas", "trials"],
    "recon": ["sd", "taesd", "clip"],
    "evaluate": ["stimuli", "betas", "trials", "masks", "rois", "eval_clip"],
}
# published facts of NSD as MindEye2 prepared it: {subject: (trials, voxels, new_test trials, test trials)}
PUBLISHED = {
    "subj01": (30000, 15724, 3000, 2770), "subj02": (30000, 14278, 3000, 2770),
    "subj03": (24000, 15226, 2371, 2113), "subj04": (22500, 13153, 2188, 1985),
    "subj05": (30000, 13039, 3000, 2770), "subj06": (24000, 17907, 2371, 2113),
    "subj07": (30000, 12682, 3000, 2770), "subj08": (22500, 14386, 2188, 1985),
}
SUBJECTS = list(PUBLISHED)
N_IMAGES = 73000  # of NSD: the facts above hold for a table of so many stimuli


# bytes of files and weights over 10 MB, as published or as they follow from published numbers (parameters in float32)
TRIAL_IN_SHARDS = 12_800
SIZES = {
    "nsddata_stimuli/stimuli/nsd/nsd_stimuli.hdf5": N_IMAGES * 425 * 425 * 3, COCO_CAPTIONS: 241 << 20,
    "gnet_multisubject.pt": 1_271_493_801,
    "unet/diffusion_pytorch_model.safetensors": 4 * 859_520_964, "text_encoder/model.safetensors": 4 * 123_060_480,
    "vae/diffusion_pytorch_model.safetensors": 4 * 83_653_863,
    f"{CLIP_MODEL}/model.safetensors": 4 * 151_277_313, f"{EVAL_CLIP}/model.safetensors": 4 * 427_616_513,
}
# of the other experiments: trials; stimuli that all subjects saw, and each subject alone, of 714 x 1360 pixels
OTHER_TRIALS = {"synthetic": 744, "imagery": 720}
SYNTHETIC_STIMULI = (220, 64)
OTHER_BETAS = "nsddata_betas/ppdata/{0}/func1pt8mm/nsd{1}betas_fithrf_GLMdenoise_RR/betas_nsd{1}.hdf5"
SYNTHETIC_BRICK = "nsddata_stimuli/stimuli/nsdsynthetic/nsdsynthetic_{}.hdf5"
SIZES |= {SYNTHETIC_BRICK.format("stimuli"): SYNTHETIC_STIMULI[0] * 714 * 1360 * 3}
SIZES |= {SYNTHETIC_BRICK.format(f"colorstimuli_{subj}"): SYNTHETIC_STIMULI[1] * 714 * 1360 * 3 for subj in SUBJECTS}
# int16; of subject 1's volume, which the others' are about as large as
SIZES |= {OTHER_BETAS.format(subj, group): trials * 81 * 104 * 83 * 2
          for subj in SUBJECTS for group, trials in OTHER_TRIALS.items()}


class Wanted(NamedTuple):
    """One file to have; of the hub's, also a pattern of files."""

    group: str
    origin: str  # "hub" (HUB_DATA), "nsd" (the bucket) or "coco"
    remote: str  # path in the repository, key in the bucket
    local: str  # under the root; of the hub's files, under the data path


def files_of(group, subjects):
    """List the files of a group, [Wanted], for some subjects; [] for weights (`weights_of`)."""
    nsd, hub = _from(group, "nsd"), _from(group, "hub")
    if group == "design":
        return [*(nsd(f"nsddata/experiments/nsd/{name}") for name in ("nsd_expdesign.mat", "nsd_stim_info_merged.csv")),
                *map(hub, ("shared1000.npy", "COCO_73k_subj_indices.hdf5"))]
    if group == "stimuli":
        return [nsd("nsddata_stimuli/stimuli/nsd/nsd_stimuli.hdf5")]
    if group == "captions":
        return [Wanted(group, "coco", COCO_CAPTIONS, "nsddata_stimuli/stimuli/nsd/annotations/nsd_captions.json")]
    if group == "betas":
        return [hub(f"betas_all_{subj}_fp32_renorm.hdf5") for subj in subjects]
    if group == "trials":
        return [hub(f"wds/{subj}/{split}/*.tar") for subj in subjects for split in ("train", "new_test", "test")]
    if group == "masks":
        return [hub("brain_region_masks.hdf5")]
    if group == "rois":
        return [nsd(f"nsddata/ppdata/{subj}/func1pt8mm/roi/{name}.nii.gz") for subj in subjects
                for name in ("nsdgeneral", "prf-visualrois")]
    if group == "synthetic":
        bricks = ["stimuli", *(f"colorstimuli_{subj}" for subj in subjects)]
        return [nsd("nsddata/experiments/nsdsynthetic/nsdsynthetic_expdesign.mat"),
                *(nsd(SYNTHETIC_BRICK.format(name)) for name in bricks),
                *(nsd(OTHER_BETAS.format(subj, group)) for subj in subjects)]
    if group == "imagery":
        return [nsd(OTHER_BETAS.format(subj, group)) for subj in subjects]
    return [hub("gnet_multisubject.pt")] if group == "gnet" else []


def known_files(file):
    """Return the files that a Wanted stands for, {remote path: bytes}, as published; smaller ones than 10 MB have 0."""
    for subj, (trials, voxels, new_test, test) in PUBLISHED.items():
        if file.remote == f"betas_all_{subj}_fp32_renorm.hdf5":
            return {file.remote: trials * voxels * 4}
        if file.remote.startswith(f"wds/{subj}/"):
            sizes = {"train": (trials - new_test, options.SESSIONS[subj]), "new_test": (new_test, 1), "test": (test, 1)}
            n_trials, n_files = sizes[file.remote.split("/")[2]]
            return {file.remote.replace("*", str(i)): n_trials * TRIAL_IN_SHARDS // n_files for i in range(n_files)}
    return {file.remote: SIZES.get(file.remote, 0)}


def _from(group, origin):
    return lambda remote: Wanted(group, origin, remote, remote)


def how_to_fetch(model):
    """Say how a model of a group is fetched; '' of any other model."""
    groups = [group for group in GROUPS if weights_of(group) and weights_of(group)[0] == model]
    return f"fetch it where there is a network (bash scripts/download.sh --what {groups[0]})" if groups else ""


def weights_of(group):
    """Return (repository, patterns of its files) of a group of weights on the hub; None of any other group."""
    weights = {"sd": (SD_MODEL, SD_FILES), "taesd": (TAESD, TAESD_FILES), "clip": (CLIP_MODEL, CLIP_FILES),
               "eval_clip": (EVAL_CLIP, CLIP_FILES)}
    return weights.get(group)
