"""Bundles behind a server: any computer on the network sends scans, and gets their segmentations back."""
