"""Decode: bytes and files in, an ImageBatch out."""

from nbvision.codecs.decode import decode
from nbvision.codecs.headers import Header, read_header

__all__ = ["Header", "decode", "read_header"]
