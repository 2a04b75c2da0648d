"""Training: what a run is made of, the one loop, its objectives, processes as a team; from a run to scores."""
