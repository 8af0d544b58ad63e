"""Where the packages lie: the checkout itself is the package `farspan` (everything else is in pyproject.toml)."""

from setuptools import find_namespace_packages, setup

ROOMS = ("comm", "modules", "pipeline", "runtime", "converters")
FOLDERS = [folder for room in ROOMS for folder in find_namespace_packages(".", include=[room, f"{room}.*"])]

setup(
    packages=["farspan", *(f"farspan.{folder}" for folder in FOLDERS)],
    package_dir={"farspan": ".", **{f"farspan.{folder}": folder.replace(".", "/") for folder in FOLDERS}},
    install_requires=[
        "torch>=2.11",
        "transformers>=5",
        "safetensors>=0.5",
        "numpy>=1.26",
        "orjson>=3.10",
        "psutil>=5.9",
        "tqdm>=4.66",
    ],
    extras_require={
        "wandb": ["wandb>=0.20"],
        "8bit": ["bitsandbytes>=0.45"],
        "cuda12": ["cupy-cuda12x>=13.6"],
        "cuda13": ["cupy-cuda13x>=13.6"],
        "data": ["datasets>=4", "zstandard>=0.22"],
        "sentencepiece": ["sentencepiece>=0.2", "protobuf>=5"],
        "watching": ["wandb>=0.20", "tensorboard>=2.18", "matplotlib>=3.9"],
        "docs": ["mkdocs-material>=9.7", "mkdocstrings[python]>=1"],
        "dev": [
            "datasets>=4",
            "zstandard>=0.22",
            "sentencepiece>=0.2",
            "protobuf>=5",
            "pytest>=8",
            "pytest-xdist>=3.6",
            "hypothesis>=6.100",
            "pyyaml>=6",
            "ruff>=0.6",
            "mypy>=1.10",
            "wandb>=0.20",
            "tensorboard>=2.18",
            "matplotlib>=3.9",
            "bitsandbytes>=0.45",
            "mkdocs-material>=9.7",
            "mkdocstrings[python]>=1",
        ],
    },
)
