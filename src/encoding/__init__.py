"""The brain as judge and guide: networks that predict voxels from a picture, and how well the two agree."""
