"""The models that ship with River."""

from pathlib import Path

TINY_MOE = Path(__file__).parent / "tiny-moe"
TINY_MOE_NAME = "river/tiny-moe"
