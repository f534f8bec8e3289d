"""The training loop that the zoo's models and SnapFusion's students share."""
