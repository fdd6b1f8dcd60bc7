"""Packaging of distill."""

from setuptools import find_packages, setup

setup(
  name="distill",
  version="0.1.0",
  description="Move capability from one generation of language model to the next.",
  license="Apache-2.0",
  python_requires=">=3.11",
  packages=find_packages(include=["distill", "distill.*"]),
  install_requires=["jax>=0.10,<0.13", "flax>=0.12.8", "optax>=0.2.8", "jaxtyping>=0.3.11", "numpy>=2"],
  extras_require={"test": ["hypothesis", "mypy", "pytest", "ruff"]},
)
