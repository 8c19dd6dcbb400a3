"""Packaging. Stage folders, configs and tools stand at the top level of the repository and are installed *inside* the
``latentcast`` package, so that they never collide with other packages of the same name (HuggingFace's
``tokenizers`` above all). See docs/architecture.md."""

import re
import sys
from pathlib import Path

from setuptools import find_namespace_packages, find_packages, setup

ROOT = Path(__file__).parent
MOUNTED = ["tokenizers", "priors", "pipelines", "configs", "tools"]


def mounted_packages():
    """``latentcast.<folder>`` -> ``<folder>`` for every mounted folder and the folders nested in it."""
    mapping = {}
    for top in MOUNTED:
        for name in [top, *(f"{top}.{sub}" for sub in find_namespace_packages(str(ROOT / top)))]:
            if "__pycache__" not in name:
                mapping[f"latentcast.{name}"] = name.replace(".", "/")
    return mapping


editable = "editable_wheel" in sys.argv
# An editable install is the path of this folder, in which latentcast/__init__.py finds the stage folders. For packages
# from several places setuptools would install a finder, and a folder latentcast/ without __init__.py, a clone beside a
# script, would go before it.
mounted = {} if editable else mounted_packages()
version = re.search(r'__version__ = "(.+?)"', (ROOT / "latentcast/__init__.py").read_text()).group(1)

setup(
    name="latentcast",
    version=version,
    description="Video prediction in latent space: frame tokenizers, swappable priors, one pipeline.",
    long_description=(ROOT / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="MIT",
    license_files=["LICENSE"],
    python_requires=">=3.11",
    packages=[*find_packages(include=["latentcast", "latentcast.*"]), *mounted],
    package_dir={"": "."} if editable else {"latentcast": "latentcast", **mounted},
    package_data={
        "latentcast": ["*.html", "py.typed"],
        "latentcast.evaluation": ["*.yaml"],
        "latentcast.reporting": ["*.j2"],
        **{name: ["*.yaml"] for name in mounted if name.startswith("latentcast.configs")},
    },
    entry_points={"console_scripts": ["latentcast = latentcast.command:main"]},
    install_requires=[
        "torch>=2.6",
        "pytorch-lightning>=2.6",
        "einops>=0.8",
        "jaxtyping>=0.3",  # shapes in signatures, which are evaluated: small, and free when programs run
        "vector-quantize-pytorch>=1.20",
        "diffusers>=0.42",
        "accelerate>=0.31",  # diffusers needs it to load weights in half precision with fp32 codebooks
        "torchsde>=0.2.6",
        "omegaconf>=2.3",
        "pydantic>=2.7",
        "wandb>=0.19",
        # decord publishes wheels for these platforms only; elsewhere PyAV reads the videos.
        'decord>=0.6; platform_machine in "x86_64 AMD64" and sys_platform != "darwin"',
        "av>=12",
        "fsspec>=2023.5",  # what lies behind URLs; torch needs it too
        "pillow>=10.1",  # whose own font has sizes
        "numpy>=1.26",
        "safetensors>=0.4",
        "torchmetrics>=1.4",
        "matplotlib>=3.8",
        "jinja2>=3.1",
        "scikit-learn>=1.4",
        "scipy>=1.11",
        "tqdm>=4.66",
        "google-crc32c>=1.5",  # the checksums of TFRecord files
        "protobuf>=4.25",  # and their records
        "argcomplete>=3.5",  # what a shell completes after latentcast
        "packaging>=23",  # whether versions are as expected here
    ],
    extras_require={
        "wandb": ["wandb>=0.28.2", "wandb-workspaces>=0.4.13"],
        "tensorboard": ["tensorboard>=2.16"],
        "trackio": ["trackio>=0.43"],
        "demo": ["gradio>=6", "starlette", "uvicorn"],
        "gym": ["gymnasium>=1.0", "ale-py>=0.10.1"],  # which brings the games
        "parquet": ["pyarrow>=16"],
        "ray": ["ray>=2.9"],  # not of dev: 76 MB
        "s3": ["s3fs>=2023.5"],
        "gs": ["gcsfs>=2023.5"],
        "docs": ["mkdocs-material>=9.5", "mkdocstrings[python]>=0.27", "ruff>=0.9"],  # ruff formats signatures
        "dev": [
            "latentcast[demo,docs,gym,parquet,tensorboard,trackio,wandb]",
            "pytest>=8",
            "pytest-timeout>=2.3",
            "pytest-xdist>=3.6",
            "ruff>=0.9",
            "pyright[nodejs]>=1.1.400",  # which brings the node that it runs on
            "beartype>=0.20",  # checks every annotated call while tests run
            "build>=1.2",
            "setuptools>=77",
            "psutil>=5.9",
            "hypothesis>=6.100",  # of tests/stress/fuzz.py
            "scikit-image>=0.22",
            "transformers>=4.46",
            "selenium>=4.20",
            "nbclient>=0.10",
            "ipykernel>=6.29",
        ],
    },
    classifiers=["Programming Language :: Python :: 3", "Topic :: Scientific/Engineering :: Artificial Intelligence"],
)
