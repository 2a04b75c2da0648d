"""COCO's captions of the images, about five of each."""

import json
import zipfile
import zlib

import utils
from disk.files import load_json, save_json
from nsd.design import load_stimulus_table

# where they are not NSD's
OWN_CAPTIONS = "import them (captions.csv), or let a BLIP write them (img2feat.py --feats c --caption_model DIR)"


def write_captions(paths, archive):
    """Make nsd_captions.json, {cocoId: [caption, ...]}, of COCO's annotations_trainval2017.zip.

    NSD's images are from both of COCO's parts. Raises UserError when an image has no caption there.
    """
    wanted = {int(coco_id): [] for coco_id in load_stimulus_table(paths)["cocoId"]}
    try:
        with zipfile.ZipFile(archive) as parts:
            for part in ("train", "val"):
                with parts.open(f"annotations/captions_{part}2017.json") as file:
                    for annotation in json.load(file)["annotations"]:
                        if annotation["image_id"] in wanted:
                            wanted[annotation["image_id"]].append(annotation["caption"].strip())
    except (zipfile.BadZipFile, KeyError, ValueError, EOFError, zlib.error) as error:
        raise utils.UserError(f"{archive}: not COCO's captions ({error}); delete it and download it again") from None
    missing = [coco_id for coco_id, texts in wanted.items() if not texts]
    if missing:
        raise utils.UserError(f"{archive}: no caption of COCO image {missing[0]} and {len(missing) - 1} others; check "
                              "nsd_stim_info_merged.csv, or delete the archive and download it again")
    save_json(paths.captions, {str(coco_id): texts for coco_id, texts in wanted.items()})


def load_captions(paths):
    """Read the captions of every image: list by image id of lists of str."""
    table, caption_file = load_stimulus_table(paths), paths.captions
    mend = "download them (bash scripts/download.sh)" if not paths.own_data.exists() else OWN_CAPTIONS
    by_coco_id = load_json(caption_file, "captions", mend)
    captions = [by_coco_id.get(str(coco_id)) for coco_id in table["cocoId"]]
    missing = [image_id for image_id, texts in enumerate(captions) if not texts]
    if missing:
        raise utils.UserError(f"{caption_file}: no caption for image {missing[0]} and {len(missing) - 1} others "
                              f"(cocoId as in nsd_stim_info_merged.csv); {mend}")
    return captions
