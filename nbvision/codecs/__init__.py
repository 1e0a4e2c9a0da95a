"""Decode: bytes and files in, an ImageBatch out. Encode: the way back."""

from nbvision.codecs.decode import decode
from nbvision.codecs.decoder import Decoder
from nbvision.codecs.encode import encode
from nbvision.codecs.headers import Header, read_header

__all__ = ["Decoder", "Header", "decode", "encode", "read_header"]
