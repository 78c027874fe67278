"""Settings, frozen and checked: of a layer (layer), and of how its exchanges overlap with compute (overlap)."""
