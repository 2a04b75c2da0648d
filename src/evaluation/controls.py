"""Controls and ceilings, as sets of pictures: what reconstructions are compared with (docs/evaluation.md, Controls).

A reconstruction is worth what it has beyond the same drawing from shuffled, noise or mean responses, the mean training
image (no brain at all) and the training image nearest to the brain's embedding (retrieval, no generator). Above it are
drawings from the true features, and what the VAE makes of the seen images themselves (the generator's own ceiling).
"""

import hashlib

import numpy as np
import torch

import utils
from disk.files import load_json, write_npy
from disk.names import LESIONS, scores_name
from disk.scores import load_scores, retrieval_stem
from evaluation.decoded import folder_with
from evaluation.networks import weights_hash
from evaluation.picture_sets import PictureSet, as_float, unlike
from nsd.clusters import in_cluster
from nsd.rows import open_feature, open_stimuli, sample_hash
from nsd.synthetic import is_synthetic
from nsd.trials import load_trials
from sampling.folders import read_images
from training.bottleneck import numbers_left

AT_ONCE = 200  # training images whose features are read together


# null controls and the ceiling that recon.py draws: what differs from the flags of the reconstructions
DRAWN = {
    "control: shuffled responses": {"control": "shuffle"},
    "control: noise responses": {"control": "noise"},
    "control: mean response": {"control": "mean"},
    "ceiling: true features": {"run": "ground_truth"},
}


PLAIN = ("control: mean image", "control: nearest training image", "ceiling: VAE round trip")  # no decoder draws these
LABELS = (*DRAWN, *PLAIN)


def drawn(images, known):
    """The controls that recon.py drew with the settings of `images`, an ImageSet.

    One that lies where they should, but was drawn otherwise (more steps, another CFG scale or model), is no control:
    what it lacks would not be the brain's alone. known: folders that are measured anyway. Returns {label: ImageSet} and
    {label: how to get it}.
    """
    sets, absent = {}, {}
    for label, changed in (DRAWN | bottlenecks(images) | lesions(images)).items():
        folder = folder_with(images, changed)
        if changed.get("run") == "ground_truth" and is_synthetic(images.image_ids):
            absent[label] = "the stimuli have no captions, so no true c"
        elif folder is None or not (folder / "index.csv").exists():
            flag = " ".join(f"--{key} {value}" for key, value in changed.items())
            absent[label] = f"score and draw it with {flag}"
        elif folder != images.folder and folder not in known:
            found = read_images(folder)
            if how := unlike(images, found, changed):
                absent[label] = (f"drawn otherwise than what is evaluated ({how}): draw it again with the same flags "
                                 "and --overwrite, or --compare it as it is")
            else:
                sets[label] = found
    return sets, absent


def bottlenecks(images):
    """{label: what differs} of the drawings through a bottleneck that lie beside `images`, the narrowest first."""
    widths = sorted(numbers_left(rest) for rest, config in beside(images, "_") if config.get("control") == rest
                    and numbers_left(rest))
    return {f"bottleneck: {k} number{'s' * (k > 1)}": {"control": f"bottleneck{k}"} for k in widths}


def lesions(images):
    """{label: what differs} of the drawings from some regions only that lie beside `images`."""
    found = {}
    for flag, word in LESIONS.items():
        for rest, config in beside(images, f"_{word}_"):
            regions = rest.replace("+", ",")
            if config.get(flag) == regions:  # or it is a --method that is called so
                found[f"lesion: {word} {regions.replace(',', ', ')}"] = {flag: regions}
    return found


def beside(images, start):
    """Look for other drawings with the same guidance, called as `images` and more.

    Returns [(what follows `start` in their name, their config.json)], by name.
    """
    folder = folder_with(images, {})
    if folder is None:
        return []
    name = folder.parents[1].name + start
    files = sorted(folder.parents[2].glob(f"{name}*/{folder.parent.name}/{folder.name}/config.json"))
    return [(file.parts[-4].removeprefix(name), load_json(file)) for file in files]


def without_decoder(seen, run, no_run, paths, feat, store, device):
    """The controls and the ceiling that no decoder draws, as sets of pictures of the images of `seen`.

    run: the flags that name the scores behind the reconstructions, or None and why; feat: the feature whose embeddings
    are retrieved; store: a FeatureStore, for what is expensive to make. Returns {label: PictureSet}, {label: why not}.
    """
    makers = dict(zip(PLAIN, (
        lambda label: mean_image(label, seen, run, paths, store),
        lambda label: nearest_image(label, seen, run, paths, feat, store),
        lambda label: vae_round_trip(label, seen, run["sd_model"], paths, store, device)), strict=True))
    if run is None:
        return {}, dict.fromkeys(makers, no_run)
    sets, absent = {}, {}
    for label, make in makers.items():
        try:
            sets[label] = make(label)
        except utils.UserError as error:  # a file that a reconstruction itself did not need
            absent[label] = str(error)
    return sets, absent


def training_images(run, paths):
    """Ids (M,), ascending, of the images that the decoder's subject trained or validated on."""
    ids = np.unique(load_trials(paths, run["subj"], "train", run["num_sessions"])["image_id"])
    return ids[~in_cluster(paths, run["hold_out"], ids)] if run.get("hold_out") else ids


def mean_image(label, seen, run, paths, store):
    """The same picture for every image: the mean of the training images, which is made once."""
    stimuli = open_stimuli(paths)
    ids = np.setdiff1d(training_images(run, paths), seen.image_ids)

    def make(file):
        total = 0.0
        for pictures in stimuli.batches(ids, AT_ONCE):
            total = total + pictures.sum(axis=0, dtype=np.float64)
        write_npy((total / len(ids)).round().astype(np.uint8))(file)

    mean = np.array(store.kept("mean_image", sample_hash(stimuli) + hash_of(ids), make))
    return PictureSet(label, seen.image_ids, lambda i, k: mean)


def nearest_image(label, seen, run, paths, feat, store):
    """For each image the training image whose feature is most similar (cosine) to the brain's embedding."""
    stimuli, feature = open_stimuli(paths), open_feature(paths, feat)
    folder = paths.scores(run["subj"], scores_name(run, feat), feat)
    ids, brain = load_scores(folder, retrieval_stem(folder))
    missing = np.setdiff1d(seen.image_ids, ids)
    if missing.size:
        raise utils.UserError(f"{folder}: no embedding for image id {missing[0]}")
    brain = np.array(brain[np.searchsorted(ids, seen.image_ids)])
    candidates = np.setdiff1d(training_images(run, paths), seen.image_ids)

    def make(file):
        queries = torch.from_numpy(brain).flatten(1)
        best, nearest = torch.full((len(brain),), -torch.inf), torch.zeros(len(brain), dtype=torch.int64)
        for start in utils.progress(range(0, len(candidates), AT_ONCE), desc=label, unit="batch", delay=2):
            part = candidates[start:start + AT_ONCE]
            rows = torch.from_numpy(feature[part].astype(np.float32)).flatten(1)
            similarity, index = (queries @ torch.nn.functional.normalize(rows).T).max(dim=1)
            nearest = torch.where(similarity > best, torch.from_numpy(part)[index], nearest)
            best = torch.maximum(best, similarity)
        write_npy(nearest.numpy())(file)

    nearest = np.array(store.kept("nearest", sample_hash(feature) + hash_of(brain) + hash_of(candidates), make))
    return PictureSet(label, seen.image_ids, lambda i, k: stimuli[nearest[[i]]][0], shows=nearest)


def hash_of(array):
    return hashlib.sha256(np.ascontiguousarray(array).tobytes()).hexdigest()


def vae_round_trip(label, seen, sd_model, paths, store, device):
    """What the VAE of sd_model, a folder or hub id, makes of the seen images when nothing is decoded from the brain."""
    if sd_model is None:
        raise utils.UserError("config.json of the images does not say which --sd_model drew them")
    from diffusers import AutoencoderKL

    try:
        vae = AutoencoderKL.from_pretrained(paths.model(sd_model), subfolder="vae").eval()
    except (OSError, ValueError) as error:
        raise utils.UserError(f"{sd_model}: its VAE could not be loaded ({str(error).splitlines()[0]})") from None
    vae.to(device, memory_format=torch.channels_last)
    side = vae.config.sample_size

    @torch.inference_mode()
    def make_all(file):
        rows = np.lib.format.open_memmap(file, "w+", np.uint8, (len(seen.image_ids), side, side, 3))
        for i in utils.progress(range(len(rows)), desc=label, unit="image", delay=2):
            image = as_float(seen.read(i, 0)[None]).to(device)
            if image.shape[-1] != side:
                image = torch.nn.functional.interpolate(image, size=(side, side), mode="bilinear", antialias=True)
            made = vae.decode(vae.encode(2 * image - 1).latent_dist.mean).sample
            rows[i] = (((made[0] + 1) / 2).clamp(0, 1) * 255).round().byte().permute(1, 2, 0).cpu().numpy()
        rows.flush()

    kept = store.kept("vae", weights_hash(vae) + seen.key(), make_all)
    return PictureSet(label, seen.image_ids, lambda i, k: np.array(kept[i]))
