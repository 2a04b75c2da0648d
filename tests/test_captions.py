"""Captions of the images, by way of NSD's table of COCO's ids."""

import json

import pytest

import tiny_nsd
import utils
from nsd.captions import load_captions


def test_captions_follow_the_coco_id(paths):
    by_coco_id = json.loads((paths.stimuli / "annotations/nsd_captions.json").read_text())
    captions = load_captions(paths)
    assert captions == [by_coco_id[str(1000 - i)] for i in range(tiny_nsd.N_IMAGES)]


def test_captions_do_not_depend_on_the_order_of_the_table(paths):
    table, expected = paths.experiments / "nsd_stim_info_merged.csv", load_captions(paths)
    header, *lines = table.read_text().splitlines()
    table.write_text("\n".join([header, *lines[::-1]]))
    assert load_captions(paths) == expected
    table.write_text("\n".join([header, *lines[:5], *lines[6:]]))
    with pytest.raises(utils.UserError, match="nsdId is not"):
        load_captions(paths)
    table.write_text("a,b\n1,2\n")
    with pytest.raises(utils.UserError, match="columns nsdId, cocoId wanted"):
        load_captions(paths)


def test_image_without_caption_and_damaged_json(paths):
    file = paths.stimuli / "annotations/nsd_captions.json"
    captions = json.loads(file.read_text())
    file.write_text(json.dumps({**captions, "993": []}))
    with pytest.raises(utils.UserError, match="no caption for image 7 "):
        load_captions(paths)
    file.write_text(json.dumps(captions)[:-10])
    with pytest.raises(utils.UserError, match="not valid JSON"):
        load_captions(paths)
