"""What pages that are served to this machine's browser share: who may ask, and what they may load."""

from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware

LOCAL = ("127.0.0.1", "localhost", "::1")
PAGE_ONLY = (
    "default-src 'self' data: blob: 'unsafe-inline' 'unsafe-eval'; form-action 'self'; frame-ancestors 'self'; "
    "base-uri 'self'"
)


class OwnFilesOnly:
    """Every answer tells the browser to load nothing from elsewhere, whatever stands in it."""

    def __init__(self, app):
        self.app = app

    async def __call__(self, scope, receive, send):
        async def with_policy(message):
            if message["type"] == "http.response.start":
                message["headers"] = [*message["headers"], (b"content-security-policy", PAGE_ONLY.encode())]
            await send(message)

        await self.app(scope, receive, with_policy if scope["type"] == "http" else send)


def guards(host):
    """Middleware of a server that listens at ``host``: on this machine alone, it is no other site's to ask."""
    hosts = [*LOCAL, host] if host in LOCAL else ["*"]
    return [Middleware(OwnFilesOnly), Middleware(TrustedHostMiddleware, allowed_hosts=hosts)]
