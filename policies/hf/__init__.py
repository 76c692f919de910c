"""Reading Hugging Face configs: `read` makes a ModelShape of a `config.json`'s keys."""

from policies.hf.config import read

__all__ = ["read"]
