"""What commands need beyond the base installation."""

from importlib.util import find_spec


def require_runtime() -> None:
    """Raise ValueError, saying what to install, where the offloading runtime cannot be imported."""
    missing = [name for name in ("torch", "transformers", "safetensors") if find_spec(name) is None]
    if missing:
        raise ValueError(f"this command runs models and needs {', '.join(missing)}: pip install 'kvsim[runtime]'")


def require_client() -> None:
    """Raise ValueError, saying what to install, where the HTTP client cannot be imported."""
    if find_spec("httpx") is None:
        raise ValueError("this command sends requests and needs httpx: pip install 'kvsim[observe]'")
