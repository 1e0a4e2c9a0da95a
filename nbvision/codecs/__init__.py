"""Decode: bytes and files in, an ImageBatch out. Encode: the way back."""

from nbvision.codecs.decode import decode
from nbvision.codecs.decoder import Decoder
from nbvision.codecs.encode import encode
from nbvision.codecs.frames import decode_frames
from nbvision.codecs.headers import Header, read_header
from nbvision.codecs.readers import NamedBytes, read_parquet, read_tar

__all__ = [
    "Decoder",
    "Header",
    "NamedBytes",
    "decode",
    "decode_frames",
    "encode",
    "read_header",
    "read_parquet",
    "read_tar",
]
