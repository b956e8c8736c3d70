"""Members, the joint dataset, its splits and its loader."""
