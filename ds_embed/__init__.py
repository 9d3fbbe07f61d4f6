"""ds_embed: text-embedding models trained on DeepSpeed. Importing it starts nothing."""

__version__ = "0.1.0"
