"""Decode: bytes and files in, an ImageBatch out. Encode: the way back."""

from nbvision.codecs.decode import decode
from nbvision.codecs.encode import encode
from nbvision.codecs.headers import Header, read_header

__all__ = ["Header", "decode", "encode", "read_header"]
