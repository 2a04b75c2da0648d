"""Captions by a BLIP of the user's, of images that nobody has captioned: one sentence each, the likeliest one."""

import torch

import utils
from disk.files import load_json, save_together, write_json
from disk.hub import require_model
from features.makers import identity
from nsd.design import load_stimulus_table
from nsd.rows import open_stimuli

SAVED_AT_ONCE = 256  # images: what a kill costs at most
MAX_TOKENS, BEAMS = 30, 3  # of a caption; sentences that are followed to find the likeliest


def write_missing_captions(paths, model, batch_size, team, overwrite=False):
    """Add captions of the images that have none to the root's captions, in the first process of the team.

    model: folder or hub id of a BLIP for captioning (transformers' BlipForConditionalGeneration, with its processor).
    nsd_captions_by.json, beside them, says which it wrote; overwrite writes those again. Raises UserError when it does
    not load, finds no words, or others were written by another model.
    """
    if team.is_main:
        write_captions_of(paths, model, batch_size, team.device, overwrite)
    team.wait()


def write_captions_of(paths, model, batch_size, device, overwrite):
    require_model(model, "--caption_model", "")
    record, maker = paths.generated_captions, identity("--caption_model", model, ".")
    written = load_json(record) if record.exists() else {"model": maker, "cocoIds": []}
    known = load_json(paths.captions) if paths.captions.exists() else {}
    if overwrite:
        known = {coco_id: texts for coco_id, texts in known.items() if coco_id not in set(written["cocoIds"])}
        written = {"model": maker, "cocoIds": []}
    elif written["model"] != maker:
        raise utils.UserError(f"{record}: {len(written['cocoIds'])} captions are by {written['model']}, wanted "
                              f"{maker}; give that --caption_model, or --overwrite to write them again")
    coco_ids = load_stimulus_table(paths)["cocoId"].astype(str).tolist()
    missing = [image_id for image_id, coco_id in enumerate(coco_ids) if not known.get(coco_id)]
    print(f"captions: {len(coco_ids) - len(missing)} of {len(coco_ids)} images have some, {len(missing)} to write by "
          f"{maker}", flush=True)
    if not missing:
        return
    stimuli, write = open_stimuli(paths), load_blip(model, device)
    with utils.progress(total=len(missing), desc="captions", unit="image") as bar:
        for start in range(0, len(missing), SAVED_AT_ONCE):
            block = missing[start:start + SAVED_AT_ONCE]
            texts = [text for at in range(0, len(block), batch_size) for text in
                     write(stimuli[block[at:at + batch_size]])]
            for image_id, text in zip(block, texts, strict=True):
                if not text:
                    raise utils.UserError(f"--caption_model {model}: found no words for image {image_id}; give a BLIP "
                                          "that was trained to caption")
                known[coco_ids[image_id]] = [text]
                written["cocoIds"].append(coco_ids[image_id])
            save_together({paths.captions: write_json(known), record: write_json(written)})
            bar.update(len(block))


def load_blip(model, device):
    """Return a function that captions pictures, (b, H, W, 3) uint8 -> b sentences; UserError when it does not load."""
    from transformers import BlipForConditionalGeneration, BlipProcessor

    try:
        processor = BlipProcessor.from_pretrained(model)
        blip = BlipForConditionalGeneration.from_pretrained(model).eval().to(device)
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        reason = str(error).strip().splitlines()[0]
        raise utils.UserError(f"--caption_model {model}: could not be loaded ({reason}); give a folder written by "
                              "save_pretrained of a BLIP for captioning and of its processor, or its name on the hub") \
            from None

    @torch.inference_mode()
    def write(pictures):
        pixels = processor(images=list(pictures), return_tensors="pt").pixel_values.to(device)
        words = blip.generate(pixel_values=pixels, max_new_tokens=MAX_TOKENS, num_beams=BEAMS, do_sample=False)
        return [text.strip() for text in processor.batch_decode(words, skip_special_tokens=True)]
    return write
