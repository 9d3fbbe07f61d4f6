"""Package metadata of ds_embed. Exact versions that were tested together are in constraints.txt."""

from setuptools import find_packages, setup

BESIDE = {
    f"ds_embed.{folder.replace('/', '.')}": folder
    for folder in ("recipes", "recipes/quickstart", "ds_configs", "slurm")
}

setup(
    name="ds-embed",
    version="0.1.0",
    description="Train text-embedding models on DeepSpeed, from one CPU to many nodes of GPUs",
    long_description=open("README.md", encoding="utf-8").read(),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.10",
    # The wheel holds what a checkout has beside the package: recipes, DeepSpeed JSONs and job scripts.
    packages=[*find_packages(include=["ds_embed", "ds_embed.*"]), *BESIDE],
    package_dir=BESIDE,
    entry_points={"console_scripts": ["ds-embed = ds_embed.cli:main"]},
    package_data={
        "ds_embed.tools.export": ["readme.md"],
        "ds_embed.tools.report": ["page.html"],
        "ds_embed.ds_configs": ["*.json"],
        "ds_embed.slurm": ["*.sh"],
    },
    install_requires=[
        "torch>=2.6",
        "deepspeed>=0.19.8",
        "transformers>=5",
        "peft>=0.21",
        "numpy>=2",
        "bm25s",
        "datasets",
        "faiss-cpu",
        "fsspec",
        "jsonlines",
        "ijson",
        "jinja2",
        "orjson",
        "matplotlib",
        "pyarrow",
        "PyYAML",
        "safetensors",
        "tqdm",
        "tensorboard",
        "ir-measures",
        "scipy",
    ],
    extras_require={
        # The quickstart's model is stored as GGUF.
        "quickstart": ["gguf"],
        # Exports for sentence-transformers are loaded with it before they are called done.
        "export": ["sentence-transformers"],
        "mteb": ["mteb"],
        # --load_in_4bit.
        "quantized": ["bitsandbytes"],
        # --map tsne of recipes/report.py.
        "report": ["scikit-learn"],
        # What benchmarks/ compares with.
        "benchmark": ["sentence-transformers>=6", "accelerate"],
        "test": [
            "pytest",
            "pytest-xdist",
            "ruff",
            "mypy",
            "types-PyYAML",
            "types-tqdm",
            "scikit-learn",
            "sentence-transformers",
            "mteb",
            "accelerate",
            "bitsandbytes",
        ],
    },
)
