"""Quern: a self-hosted, multi-tenant form backend with its own AI, on plain CPUs."""
