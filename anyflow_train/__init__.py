"""Distil a video diffusion teacher into an any-step student (AnyFlow, arXiv 2605.13724)."""

__version__ = "0.1.0"
