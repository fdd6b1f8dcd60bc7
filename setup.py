"""Packaging of distill."""

from setuptools import find_packages, setup

setup(
  name="distill",
  version="0.1.0",
  description="Move capability from one generation of language model to the next.",
  license="Apache-2.0",
  python_requires=">=3.11",
  packages=find_packages(include=["distill", "distill.*"]),
  package_data={"distill.demo": ["**/*"]},
  install_requires=[
    "absl-py>=2.1",
    "array-record>=0.8",
    "datasets>=4",
    "flax>=0.12.8",
    "grain>=0.2.15",
    "huggingface-hub>=1",
    "importlib-resources>=6",  # etils.epath, under tensorflow-datasets, imports it without asking for it
    "jax>=0.10,<0.13",
    "jaxtyping>=0.3.11",
    "jinja2>=3.1",
    "ml-collections>=1.1",
    "ml-dtypes>=0.5",
    "numpy>=2",
    "optax>=0.2.8",
    "orbax-checkpoint>=0.12.8",
    "safetensors>=0.8",
    "tensorboardX>=2.6.4",
    "tensorflow-datasets>=4.9.9",
    "tqdm>=4.66",
    "transformers>=5.20,<6",
  ],
  extras_require={
    "test": [
      "beartype",
      "hypothesis",
      "mypy",
      "peft==0.21.2",
      "pytest",
      "pytest-xdist",
      "ruff",
      "tokenizers",
      "torch==2.13.0",
    ],
    "plan": ["jax[tpu]"],  # libtpu in the version that goes with jax
    "bench": ["torch==2.13.0"],
  },
  entry_points={"console_scripts": ["distill = distill.cli.main:run"]},
)
