"""Settings, frozen and checked: of a layer (layer), its router (routing), and exchanges beside compute (overlap)."""
