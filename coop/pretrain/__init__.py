"""CLIP's own contrastive pre-training, for anyone with images and texts."""
