"""Pictures that strangers send: looked at with limits before anything else touches them."""

from __future__ import annotations

import base64
import binascii
import struct
import zlib
from io import BytesIO

from ..errors import RequestError

FORMATS = {"PNG": ".png", "JPEG": ".jpg", "WEBP": ".webp"}  # of Pillow; no other decoder is run
MAX_PIXELS = 50_000_000


def from_base64(text: str, name: str) -> bytes:
    """The bytes in base64, or in a data: URL. RequestError for anything else, such as a path."""
    head, comma, rest = text.partition(",")
    if comma and head.startswith("data:"):
        if not head.endswith(";base64"):
            raise RequestError(f"{name} is a data: URL that is not base64")
        text = rest
    try:
        return base64.b64decode("".join(text.split()), validate=True)
    except (binascii.Error, ValueError) as error:
        raise RequestError(
            f"{name} is neither base64 nor an http(s) URL; paths of the service's machine are not "
            "read, so send the picture itself"
        ) from error


def check_picture(data: bytes, name: str) -> str:
    """Decode it once, whole, in memory. Its suffix, by content and never by what it is called.

    RequestError when it is no PNG, JPEG or WebP, is damaged, or has more than 50 million pixels.
    """
    from PIL import Image, UnidentifiedImageError

    bombs = (Image.DecompressionBombError, Image.DecompressionBombWarning)
    try:
        with Image.open(BytesIO(data), formats=tuple(FORMATS)) as picture:
            width, height = picture.size
            if width * height > MAX_PIXELS:
                raise RequestError(
                    f"{name} is {width}x{height}; {MAX_PIXELS / 1e6:.0f} million pixels are the "
                    "most, so send it smaller"
                )
            picture.load()
            return FORMATS[str(picture.format)]
    except bombs as error:
        raise RequestError(f"{name} has too many pixels: {error}") from error
    except UnidentifiedImageError as error:
        raise RequestError(f"{name} is not a PNG, JPEG or WebP picture") from error
    except (OSError, ValueError, SyntaxError, EOFError, struct.error, zlib.error) as error:
        raise RequestError(f"{name} is damaged and cannot be decoded ({error})") from error
