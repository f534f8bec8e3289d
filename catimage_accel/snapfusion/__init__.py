"""SnapFusion (arXiv 2306.00980): an efficient UNet, a pruned image decoder, and students that need few steps."""
