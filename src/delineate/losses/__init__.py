"""Losses: ``loss(logits, target, image)``, where a target's ignored voxels weigh nothing."""
