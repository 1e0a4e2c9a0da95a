"""Pipelines over HTTP and gRPC."""

from nbvision.serve.config import Config, read_config
from nbvision.serve.server import serve

__all__ = ["Config", "read_config", "serve"]
