"""Weights of the vision and audio towers beside a language model, where their config says enough."""

from collections.abc import Mapping
from typing import Any

_TOWERS = ("vision_config", "visual", "vision_tower_config", "vit_config", "audio_config", "speech_config")


def count_towers(config: Mapping[str, Any]) -> tuple[int, tuple[str, ...]]:
    """Weights of all towers, and a note for each that is not counted."""
    found = [key for key in _TOWERS if isinstance(config.get(key), Mapping)]
    return 0, tuple(f"{key}: its weights are not counted, and take memory besides" for key in found)
