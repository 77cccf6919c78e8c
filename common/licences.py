"""What a study may say of its release for those who find it: a licence, an address, a line of text."""

from __future__ import annotations

import re
from typing import Annotated

from pydantic import AfterValidator, Field

ADDRESS = r"https?://[^\s<>\"{}|\\^`\x00-\x20\x7f]+"
SPDX = r"[A-Za-z0-9.\-+]+"


def _line(text: str) -> str:
    if not text.strip() or any(ord(character) < 32 or ord(character) == 127 for character in text):
        raise ValueError(f"{text!r} is not one line of text")
    return text.strip()


def _address(text: str) -> str:
    if not re.fullmatch(ADDRESS, text):
        raise ValueError(f"{text!r} is not an address that begins with https:// or http://")
    return text


def _licence(text: str) -> str:
    """An SPDX identifier in its canonical spelling, or an address as it is; `ValueError` for anything else."""
    if re.fullmatch(ADDRESS, text):
        return text
    # Imported here: the list of licences is long, and few studies name one.
    from packaging.licenses import InvalidLicenseExpression, canonicalize_license_expression

    try:
        # One licence, and one whose text a reader can find: no expression, and no name of one's own.
        if re.fullmatch(SPDX, text) and not text.lower().startswith("licenseref-"):
            return canonicalize_license_expression(text)
    except InvalidLicenseExpression:
        pass
    raise ValueError(f"{text!r} is neither an SPDX licence identifier, such as 'CC-BY-4.0', nor an https:// address")


LONGEST = Field(max_length=2000)
Line = Annotated[str, LONGEST, AfterValidator(_line)]
Address = Annotated[str, LONGEST, AfterValidator(_address)]
Licence = Annotated[str, LONGEST, AfterValidator(_licence)]
