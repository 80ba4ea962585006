"""CLIP's own contrastive pre-training: `python -m experiments.pretrain PAIRS --out FOLDER`."""
