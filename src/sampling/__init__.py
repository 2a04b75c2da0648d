"""Everything that draws: the guided pipeline, its guidance terms, what it starts from, and folders of pictures."""
