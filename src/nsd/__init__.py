"""Everything that knows the Natural Scenes Dataset: its files, ids, trials and regions, and where to get them."""
