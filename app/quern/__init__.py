"""Quern: a self-hosted, multi-tenant form backend with its own AI, on plain CPUs."""

from typing import Final

__version__: Final = "0.1.0"
