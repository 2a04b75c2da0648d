"""The model card of an export: what people read before they use it."""

LICENCE = """The weights, means and components in this folder were learned from the Natural Scenes Dataset (NSD).
NSD's terms of access forbid passing on its data; there is none inside: no responses, no stimuli, no captions, no
image's features or coefficients, no list of images. What is inside are parameters, and averages over images and
trials. Before you publish it, check that NSD's terms as you signed them (http://naturalscenesdataset.org) allow it;
whoever uses it on NSD's responses needs access of their own. The features are those of CLIP and of Stable Diffusion,
which have licences of their own (Stable Diffusion v1: CreativeML OpenRAIL-M)."""

FIVE_LINES = """from sampling.pipeline import load_pipeline
from sharing.decoder import BrainDecoder
decoder = BrainDecoder.from_pretrained("{folder}")    # this folder, or its id on the hub
features = decoder.decode(responses)    # (N, {n_voxels}) -> {{{feats}}}
pictures = decoder.draw(responses, load_pipeline("{sd_model}", "cpu"))    # (N, H, W, 3) uint8"""


def write_card(config):
    """Return the text of README.md, of what config.json says."""
    features, protocol, subj = config["features"], config["protocol"], config["subj"]
    parts = [front_matter(config), f"# fMRI decoders of {subj} (Natural Scenes Dataset)", inside(config),
             "## Use", "With the code's `src/` on Python's path:", indented(FIVE_LINES.format(
                 folder="FOLDER", n_voxels=config["n_voxels"], feats=", ".join(f'"{feat}": (N, ...)' for feat in
                                                                             list(features)[:2]),
                 sd_model="CompVis/stable-diffusion-v1-4")),
             "`responses`: float32, one row per image, the mean of its trials; voxels of NSD's nsdgeneral in "
             "MindEye2's order, z-scored by session. To score and draw with all of the code's own scripts: "
             "`python src/share.py import FOLDER`.",
             "## Protocol", protocol_text(protocol, subj), "## How well", r2_table(features)]
    parts += evaluations(config["evaluations"])
    parts += ["## Made from", made_from(config), "## Licence", LICENCE]
    return "\n\n".join(parts) + "\n"


def front_matter(config):
    """Return the YAML block that the hub reads."""
    lines = ["license: other", "license_name: learned-from-nsd", "license_link: http://naturalscenesdataset.org",
             "library_name: pytorch", "tags:", "- fmri", "- brain-decoding", "- neuroscience", "- safetensors"]
    return "\n".join(["---", *lines, "---"])


def inside(config):
    """Say what the folder holds."""
    kinds = {entry["state"]["model_args"]["kind"] for entry in config["runs"].values()}
    names = {"components": "regressions of principal components", "ridge": "ridge regressions",
             "brain": "MindEye2's networks", "latent": "MindEye2's network of latents"}
    what = " and ".join(names.get(kind, kind) for kind in sorted(kinds))
    runs = ", ".join(f"`{name}`" for name in config["runs"])
    return (f"Predict features of the picture that a person sees from their fMRI: {', '.join(config['features'])} (c: "
            "CLIP's text embedding of its captions; z: the latent of Stable Diffusion's autoencoder; g_k: layers of "
            f"CLIP's vision model). Inside are {what}: {runs}; safetensors and JSON only.{adapter_text(config)}")


def adapter_text(config):
    """Say what the adapter is, where there is one."""
    if not config["adapter"]:
        return ""
    model = config["adapter"]["state"]["config"].get("sd_model")
    return (f" Beside them an adapter, `{config['adapter']['run']}`, by which Stable Diffusion (`{model}`) attends to "
            "the decoded g_k: `decoder.draw(..., use_adapter=True)`.")


def protocol_text(protocol, subj):
    """Say what was trained, validated and tested on what."""
    held_out = protocol.get("hold_out")
    without = f" None is of cluster {held_out} of what captions say (`--hold_out`)." if held_out else ""
    return (f"- Responses of {subj}, {protocol['num_sessions']} sessions. Training sees trials, alone or averaged over "
            "some of an image's; validated and tested is on the mean of all of an image's.\n"
            f"- Training: {protocol['train_images']} images ({protocol['train_trials']} trials). Validation: "
            f"{protocol['val_images']} images, a fraction of {protocol['val_fraction']:g} by image with seed "
            f"{protocol['seed']}; errors, stacking weights and R2 are theirs.{without}\n"
            f"- Test: the {protocol['test_images']} shared images (new_test); none of them trained, validated, or had "
            "components fitted to it.")


def r2_table(features):
    """The R2 of each feature on validation images as a table, and how much the network counts beside the ridge."""
    columns = list(dict.fromkeys(name for entry in features.values() for name in entry["r2"]))
    rows = [["R2 on validation images", *columns, "network's weight"]]
    rows += [[feat, *(f"{entry['r2'][name]:.3f}" if name in entry["r2"] else "" for name in columns),
              f"{entry['weight']:.2f}" if entry["ridge"] else ""] for feat, entry in features.items()]
    return table(rows)


def evaluations(found):
    """Parts of the card that say how the pictures were that were drawn from these runs' scores; none where none were.
    """
    parts = []
    for folder, known in found.items():
        how = [", ".join(known["features"]), known["sd_model"], f"{known['steps']} steps"]
        how += [f"guidance {known['guidance_rule']}"] if known["guidance_rule"] else []
        rows = [["metric", "value", "95 % interval", "n"]]
        rows += [[name, number(entry["value"]), f"{number(entry['ci_low'])} .. {number(entry['ci_high'])}"
                  if entry["ci_low"] is not None else "", str(entry["n"])] for name, entry in known["metrics"].items()
                 if entry["value"] is not None]
        parts += [f"Pictures `{folder}` ({'; '.join(map(str, how))}):", table(rows)]
    return parts or ["No pictures drawn from these runs' scores have been evaluated."]


def made_from(config):
    """List the hashes of what the runs were made from."""
    found = {}
    for entry in config["runs"].values():
        found |= entry["state"]["config"].get("made_from", {})
    for feat, entry in config["features"].items():
        if entry["components"]:
            found[f"components of {feat}"] = (f"{entry['components']['digest']} (fitted to "
                                              f"{entry['components']['n_fitted']} images of no test set)")
    found |= {f"checkpoint of {name}": entry["checkpoint_hash"] for name, entry in config["runs"].items()}
    return table([["what", "hash"], *([what, value] for what, value in found.items())]
                 + ([["code", config["commit"]]] if config["commit"] else []))


def table(rows):
    """Rows of words as a table of Markdown, the first row its head."""
    head, *body = ("| " + " | ".join(row) + " |" for row in rows)
    return "\n".join([head, "|" + "---|" * len(rows[0]), *body])


def number(value):
    return f"{value:.3g}" if abs(value) < 1000 else f"{value:.0f}"


def indented(text):
    return "\n".join(f"    {line}" for line in text.splitlines())
