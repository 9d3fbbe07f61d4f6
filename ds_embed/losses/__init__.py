"""Losses: pure functions from embeddings to (loss, gradient); no ranks, no models."""

from ds_embed.losses.contrastive import ContrastiveResult, contrastive_loss

__all__ = ["ContrastiveResult", "contrastive_loss"]
