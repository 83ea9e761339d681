"""Training stages, one file each, all runnable by `accelerate launch -m`."""
