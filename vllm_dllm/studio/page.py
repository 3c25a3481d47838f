"""`page.html` with its scripts and what it is to show: a server's address, or a recording, which makes it a file.

The page loads nothing: its styles and scripts are in it, and its content-security policy allows these by their hashes,
and of connections those to who served it.
"""

import base64
import hashlib
import json
import re
from functools import cache
from importlib.resources import files
from typing import Any

from vllm_dllm.policy_options import policy_names

VERSION = 1
"""Of a recording, as `logic.js` has it."""

_META = '<meta http-equiv="Content-Security-Policy" content="default-src \'none\'">'
_GIVEN = re.compile(r'(<script type="application/json" id="given">)([^<]*)(</script>)')
_SCRIPT = re.compile(r'(<script id="(\w+)">)(</script>)')
_SOURCES = {
    "script-src": re.compile(r'<script id="\w+">(.*?)</script>', re.S),
    "style-src": re.compile(r"<style>(.*?)</style>", re.S),
}


@cache
def _template() -> str:
    folder = files("vllm_dllm.studio")
    page = (folder / "page.html").read_text("utf-8")
    return _SCRIPT.sub(lambda found: found[1] + (folder / f"{found[2]}.js").read_text("utf-8") + found[3], page)


def policy(*, is_live: bool) -> str:
    """Return the page's content-security policy; a page that is not live may ask nobody."""
    parts = ["default-src 'none'", "base-uri 'none'", "form-action 'none'"]
    for name, pattern in _SOURCES.items():
        digests = (hashlib.sha256(source.encode()).digest() for source in pattern.findall(_template()))
        hashes = " ".join(f"'sha256-{base64.b64encode(digest).decode()}'" for digest in digests)
        parts.append(f"{name} {hashes}")
    return "; ".join([*parts, *(["connect-src 'self'"] if is_live else [])])


def live_page(server: str) -> str:
    """Return the page for a server; it proposes the policies that are installed here.

    Args:
        server: its origin, as `http://127.0.0.1:8000`, which it names; it asks who served it.
    """
    return _page({"server": server, "policies": policy_names()}, policy(is_live=True))


def recorded_page(recording: dict[str, Any]) -> str:
    """Return the page with a recording, as `record.record` makes it."""
    return _page({"recording": recording}, policy(is_live=False))


def _page(given: dict[str, Any], allowed: str) -> str:
    text = json.dumps(given, ensure_ascii=False, separators=(",", ":")).replace("<", "\\u003c")
    page = _template().replace(_META, _META.replace("default-src 'none'", allowed))
    return _GIVEN.sub(lambda found: found[1] + text + found[3], page, count=1)
