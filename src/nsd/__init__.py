"""Everything that knows the Natural Scenes Dataset: its files, ids, trials and regions, and where to get them.

Data of one's own are imported into the same formats (own_data.py, own_betas.py, own_root.py).
"""
