"""Move capability from one generation of language model to the next."""

__version__ = "0.1.0"
