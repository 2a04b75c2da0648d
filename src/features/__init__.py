"""What img2feat.py is made of: networks that make features of the stimuli, and the files these are written to."""
