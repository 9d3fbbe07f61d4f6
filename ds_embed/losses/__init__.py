"""Losses: pure functions from embeddings to (loss, gradient); no ranks, no models."""

from ds_embed.losses.contrastive import LossOptions, LossResult, contrastive_loss
from ds_embed.losses.sides import Sums

__all__ = ["LossOptions", "LossResult", "Sums", "contrastive_loss"]
