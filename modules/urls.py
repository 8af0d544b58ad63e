"""Addresses where a path is wanted. farspan reads and writes files; a URL would become a folder called `s3:`."""

from __future__ import annotations

import re


def url_fault(flag: str, value: object, allowed: str = "") -> str:
    """Why `value` is no path, in words, or "". `allowed`: a scheme that may be."""
    found = re.match(r"\s*([A-Za-z][A-Za-z0-9+.-]*)://", str(value))
    if found is None or found[1].lower() == allowed:
        return ""
    return (
        f"{flag} {value}: {found[1]}:// cannot be used yet: give a path on this machine (mount the bucket, or copy it)"
    )
