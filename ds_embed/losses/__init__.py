"""Losses: pure functions from embeddings to (loss, gradient); no ranks, no models."""

from ds_embed.losses.contrastive import LossOptions, LossResult, contrastive_loss

__all__ = ["LossOptions", "LossResult", "contrastive_loss"]
