"""The folder that a run leaves: its files, manifest, hashes and card."""
