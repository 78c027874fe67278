"""In which order a call's steps run, and what runs them."""
