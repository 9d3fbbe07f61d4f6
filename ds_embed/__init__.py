"""ds_embed: text-embedding models trained on DeepSpeed. Importing it starts nothing."""

__version__ = "0.1.0"
__all__ = ["Embedder"]


def __getattr__(name: str):
    # torch and transformers take seconds to import: they wait until the class is asked for.
    if name == "Embedder":
        from ds_embed.vectors.embedder import Embedder

        return Embedder
    raise AttributeError(f"module 'ds_embed' has no attribute '{name}'")
