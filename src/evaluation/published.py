"""Results that others published on NSD under the protocol `mindeye2`, and how far each metric agrees with people."""

from typing import NamedTuple

METRICS = ("pixcorr", "ssim", "alexnet2_two_way", "alexnet5_two_way", "inception_two_way", "clip_two_way",
           "effnet_distance", "swav_distance")  # the columns of published tables
NSD_IMAGES = 73000  # stimuli: results on another world are not comparable


class Published(NamedTuple):
    """A row of a published table."""

    method: str
    subjects: str  # whose mean it is
    sessions: int
    values: tuple  # of METRICS; two-way rates in %; None: not said
    source: str


TABLES = "tables of the MindEye2 paper (recomputed by its authors) and of the Brain-IT project page"
SECOND_HAND = "second-hand, by a later paper"
FOUR = "1, 2, 5, 7"
PUBLISHED = [
    Published("Takagi & Nishimoto 2023", FOUR, 40, (.246, .410, 78.9, 85.6, 83.8, 82.1, .811, .504), TABLES),
    Published("Brain-Diffuser 2023", FOUR, 40, (.273, .365, 94.4, 96.6, 91.3, 90.9, .728, .421), TABLES),
    Published("MindEye1 2023", FOUR, 40, (.319, .360, 92.8, 96.9, 94.6, 93.3, .648, .377), TABLES),
    Published("DREAM 2024", FOUR, 40, (.274, .328, 93.9, 96.7, 93.4, 94.1, .645, .418), TABLES),
    Published("UMBRAE 2024", FOUR, 40, (.283, .341, 95.5, 97.0, 91.7, 93.5, .700, .393), TABLES),
    Published("MindBridge 2024", FOUR, 40, (.151, .263, 87.7, 95.5, 92.4, 94.7, .712, .418), TABLES),
    Published("NeuroPictor 2024", FOUR, 40, (.229, .375, 96.5, 98.4, 94.5, 93.3, .639, .350), TABLES),
    Published("MindEye2 2024", FOUR, 40, (.322, .431, 96.1, 98.6, 95.4, 93.0, .619, .344), TABLES),
    Published("MindTuner 2025", FOUR, 40, (.322, .421, 95.8, 98.8, 95.6, 93.8, .612, .340), TABLES),
    Published("Brain-IT 2026", FOUR, 40, (.386, .486, 98.4, 99.5, 97.3, 96.4, .564, .320), TABLES),
]
# MindEye2's brain correlations (its paper, table 3)
PUBLISHED_BRAIN = {"nsd_general": .373, "V1": .364, "V2": .352, "V3": .342, "V4": .327, "higher_vis": .368}
# of one subject, or with other settings: for the ledger (benchmarks/ledger.py), not for the table of the report
FURTHER = [
    Published("MindEye2 2024", "1", 40, (.374, .439, 97.9, 99.1, 96.0, 93.7, .607, .336),
              "outputs printed in final_evaluations.ipynb of the MindEyeV2 repository (c184718), model "
              "final_subj01_pretrained_40sess_24bs, 1,000 images"),
    Published("MindEye2 2024, unrefined", FOUR, 40, (.278, .328, 95.2, 99.0, 96.4, 94.5, .622, .343), TABLES),
    Published("MindEye2 2024", FOUR, 1, (.195, None, None, None, None, 79.2, None, None), "MindEye2 paper"),
    Published("MindTuner 2025", FOUR, 1, (.224, None, None, None, None, 83.5, None, None), SECOND_HAND),
    Published("Brain-IT 2026", FOUR, 1, (.331, None, None, None, None, 93.0, None, None), SECOND_HAND),
    Published("NeuralDiffuser on SD 2.1, run again by the authors of PRISM", FOUR, 40,
              (.301, .335, None, None, 94.87, 94.09, None, None), SECOND_HAND),
]

# Pearson correlation of a metric with what 22 people said of 1,000 pairs of a seen and a reconstructed image (SEED)
AGREES_WITH_PEOPLE = {"effnet_distance": .748, "clip_two_way": .436, "pixcorr": .117, "ssim": .112}
