"""Renders the page from its Jinja2 template, with style and script inside: nothing else is loaded."""

from collections.abc import Mapping, Sequence
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

__all__ = ["content_policy", "render_page"]


def render_page(model: Mapping[str, str], caveats: Sequence[str], setup: Mapping[str, Any], nonce: str) -> str:
    """Return the page.

    Args:
        model: facts of the model, label by label.
        caveats: what a reader must know before any answer, as sentences without a full stop.
        setup: what the script must know.
        nonce: marks the page's own style and script; see `content_policy`.
    """
    environment = Environment(
        loader=PackageLoader("aullm_dist.app", "."), autoescape=True, undefined=StrictUndefined, trim_blocks=True,
        lstrip_blocks=True,
    )  # fmt: skip
    return environment.get_template("page.html.jinja").render(model=model, caveats=caveats, setup=setup, nonce=nonce)


def content_policy(nonce: str) -> str:
    """Return the Content-Security-Policy that lets the page run what it brought, and ask this server alone."""
    rules = (
        "default-src 'none'", f"script-src 'nonce-{nonce}'", f"style-src 'nonce-{nonce}'", "img-src 'self' data:",
        "connect-src 'self'", "base-uri 'none'", "form-action 'none'", "frame-ancestors 'none'",
    )  # fmt: skip
    return "; ".join(rules)
