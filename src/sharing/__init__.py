"""Trained decoders in a folder for others: written, checked, brought into another root, used by themselves."""
