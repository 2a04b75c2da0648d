"""Decoders by themselves: responses -> features and pictures, without NSD's files."""

import numpy as np
import torch

import utils
from disk.hub import require_model
from models import restore
from nsd import sources
from sampling.adapter import attach, check_scores, restore_adapter
from sharing.folder import STATISTICS, open_export
from training.latent_statistics import restandardise
from training.stacking import FeatureOf

PRECISIONS = {torch.float16: "fp16", torch.bfloat16: "bf16"}


class BrainDecoder:
    """The decoders of one subject: from its responses (N, V) to features (decode) and pictures (draw).

    .subj, .n_voxels   whose responses, and V
    .feats             features that are decoded
    .adapter           models.FeatureAdapter, which draws with them, or None
    .config            what the export's config.json says: R2, protocol, hashes (docs/sharing.md)
    """

    def __init__(self, config, models, bases, beside, device, adapter=None):
        """models: {feature: network with a `predict`}; bases: {feature: nsd.components.Basis or None}; beside:
        {feature: {name: array}}, its errors and statistics; adapter: models.FeatureAdapter or None."""
        self.config, self.subj, self.n_voxels = config, config["subj"], config["n_voxels"]
        self.models, self.bases, self.beside, self.device = models, bases, beside, device
        self.feats, self.adapter = list(models), adapter

    @classmethod
    def from_pretrained(cls, name, device="cpu"):
        """Load an export, a folder or an id on the Hugging Face hub; UserError where it is none, or was changed."""
        utils.reproducible_products()
        export, device = open_export(name, "BrainDecoder"), utils.pick_device(device)
        runs, config = export.config["runs"], export.config
        networks = {run: restore(export.state(run), export.folder / entry["file"]).eval().to(device)
                    for run, entry in runs.items()}
        models, bases, beside = {}, {}, {}
        for feat, entry in config["features"].items():
            bases[feat], beside[feat] = export.feature(feat)
            models[feat] = networks[entry["run"]]
            if "components" in runs[entry["run"]]["state"]["model_args"]:
                if bases[feat] is None:
                    raise utils.UserError(f"{export.folder}: has no components of {feat}, which its decoder predicts; "
                                          "export it again")
                models[feat] = FeatureOf(models[feat], bases[feat]).to(device)
                models[feat].ridge = entry["ridge"] and networks[entry["ridge"]]
                models[feat].weight = entry["weight"]
            if feat == "z" and not set(STATISTICS) <= beside[feat].keys():
                raise utils.UserError(f"{export.folder}: has no statistics of z; export it again")
        adapter = export.adapter and restore_adapter(export.state(export.adapter["run"]), export.adapter["file"])
        return cls(config, models, bases, beside, device, adapter)

    @torch.no_grad()
    def decode(self, responses, feats=None, batch_size=100):
        """Predict features of the seen images: {feature: (N, ...) float32}, as score scripts save them.

        responses: (N, V), the mean of an image's trials, z-scored by session. feats: which features; None: all. In
        batches of the score scripts' size the numbers are theirs to the bit. z has the mean and standard deviation of
        latents, from which pictures start. Raises UserError for responses of another shape.
        """
        responses, found = self._checked(responses), {}
        unknown = [feat for feat in feats or [] if feat not in self.models]
        if unknown:
            raise utils.UserError(f"BrainDecoder of {self.subj}: does not decode {unknown[0]}, wanted any of "
                                  f"{', '.join(self.feats)}")
        for feat in self.feats if feats is None else feats:
            whose, parts = self.config["features"][feat]["whose"], []
            for start in range(0, len(responses), batch_size):
                voxels = torch.from_numpy(responses[start:start + batch_size]).to(self.device)
                parts.append(self.models[feat].predict({whose: voxels}, 1)["nsdgeneral"].cpu().numpy())
            found[feat] = np.concatenate(parts)
            if feat == "z":
                found[feat] = restandardise(found[feat], *(self.beside[feat][name] for name in STATISTICS))
        return found

    def draw(self, responses, pipeline, image_ids=None, clip_model=sources.CLIP_MODEL, use_adapter=False, **settings):
        """Draw a picture for each response (N, V): (N, H, W, 3) uint8.

        pipeline: of sampling.pipeline.load_pipeline. c is the condition, z (if it is decoded) where a path starts, and
        all decoded g_k guide as measurements with the errors that they had on validation images, as recon.py does by
        default. image_ids: N whole numbers that the noise is drawn from; None counts from 0. clip_model: the CLIP that
        g_k comes from; None: nothing guides. use_adapter: Stable Diffusion attends to g_k, too. settings: of
        sampling.drawing.Settings, such as num_inference_steps.
        Raises UserError for what does not fit the pipeline, and for pictures that are not finite.
        """
        from sampling.decoders import load_guidance_decoder
        from sampling.drawing import Sampler, Settings, as_pixels, batches

        if "c" not in self.models:
            raise utils.UserError(f"BrainDecoder of {self.subj}: decodes {', '.join(self.feats)}, and pictures need c; "
                                  "export it with c")
        device = pipeline._execution_device
        settings = Settings(**{"precision": PRECISIONS.get(pipeline.unet.dtype, "fp32"), **settings})
        guided = clip_model is not None and settings.guidance_scale * settings.guidance_strength > 0
        layers = [feat for feat in self.feats if feat.startswith("g_") and guided]
        looks = self._attached(pipeline, device) if use_adapter else []
        decoded = self.decode(responses, [feat for feat in self.feats if feat in ("c", "z", *layers, *looks)])
        if use_adapter:
            check_scores(self.adapter, decoded, self.config["adapter"]["run"])
        guides, decoder = [], None
        if layers:
            guides = [self._measurements({feat: decoded[feat] for feat in layers}, clip_model, device)]
            if settings.guidance_decoder not in ("full", "half"):
                require_model(settings.guidance_decoder, "guidance_decoder",
                              sources.how_to_fetch(settings.guidance_decoder) or "full or half")
            decoder = load_guidance_decoder(settings.guidance_decoder, pipeline)
        image_ids = np.arange(len(decoded["c"])) if image_ids is None else np.asarray(image_ids)
        scores = {feat: rows for feat, rows in decoded.items() if feat in ("c", *looks)}
        sampler = Sampler(pipeline, scores, image_ids, guides, decoder, settings, device, decoded.get("z"),
                          self.adapter if use_adapter else None)
        jobs = [(row, 0) for row in range(len(decoded["c"]))]
        sampler.check(jobs[0])
        pictures = torch.cat([images.cpu() for _, images, _ in batches(jobs, sampler)])
        if not torch.isfinite(pictures).all():
            raise utils.UserError(f"guidance_scale {settings.guidance_scale:g}: the sampler diverged (NaN), wanted "
                                  "finite pictures; lower the scale or load the pipeline in float32")
        return as_pixels(pictures)

    def _attached(self, pipeline, device):
        """Let the pipeline's UNet attend to the adapter's tokens; returns the features that these are made of."""
        if self.adapter is None:
            raise utils.UserError(f"BrainDecoder of {self.subj}: has no adapter; draw without (use_adapter=False), or "
                                  "export it with one")
        entry = self.config["adapter"]
        attach(self.adapter, pipeline.unet, device, entry["run"], entry["state"]["config"].get("sd_model"))
        return self.adapter.feats

    def _measurements(self, scores, clip_model, device):
        """Decoded layers {g_k: (N, T, D)} as what guides: sampling.measurements.ClipMeasurements."""
        from models import ClipFeatures
        from sampling.measurements import ClipMeasurements, Measurement

        without = [feat for feat in scores if "errors" not in self.beside[feat]]
        if without:
            raise utils.UserError(f"BrainDecoder of {self.subj}: has no errors of {', '.join(without)} (exported "
                                  "without components), so that they cannot guide; give clip_model=None")
        require_model(clip_model, "clip_model", sources.how_to_fetch(clip_model))
        measured = {int(feat.removeprefix("g_")): Measurement.of(self.bases[feat], rows, self.beside[feat]["errors"],
                                                                 device=device) for feat, rows in scores.items()}
        return ClipMeasurements(ClipFeatures.from_pretrained(clip_model, list(measured)).float().to(device), measured)

    def _checked(self, responses):
        """Return responses as float32; UserError unless they are (N, V), some, and finite."""
        responses = np.ascontiguousarray(responses, np.float32)
        if responses.ndim != 2 or responses.shape[1] != self.n_voxels or not len(responses):
            raise utils.UserError(f"responses: of shape {responses.shape}, the decoders of {self.subj} take (N, "
                                  f"{self.n_voxels}) voxels; give responses of {self.subj}, in the order of NSD's "
                                  "nsdgeneral")
        if not np.isfinite(responses).all():
            raise utils.UserError("responses: NaN or infinite values, wanted finite ones; leave these trials out")
        return responses
