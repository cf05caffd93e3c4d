"""Pictures from the web, for a service that was told to fetch them.

What a name resolves to is checked, every address of it, and the connection goes to exactly what was
checked: a second lookup, which could answer differently (DNS rebinding), does not happen. Redirects
are new requests and checked like the first.
"""

from __future__ import annotations

import asyncio
import ipaddress
import socket
from urllib.parse import urljoin, urlsplit

import aiohttp
from aiohttp.abc import AbstractResolver, ResolveResult

from ..errors import RequestError

MAX_REDIRECTS = 3
SECONDS = 20
CHUNK = 1 << 16
# Global by the registry, and yet a way to an IPv4 address in disguise: NAT64, 6to4, Teredo.
DISGUISES = [ipaddress.ip_network(net) for net in ("64:ff9b::/96", "2002::/16", "2001::/32")]


def is_public(text: str) -> bool:
    """Whether an address in text is one that anybody on the internet could be asked for."""
    address = ipaddress.ip_address(text.partition("%")[0])
    if isinstance(address, ipaddress.IPv6Address):
        if address.ipv4_mapped is not None:
            return is_public(str(address.ipv4_mapped))
        if any(address in network for network in DISGUISES):
            return False
    return address.is_global and not address.is_multicast and not address.is_reserved


class PublicResolver(AbstractResolver):
    """Names to addresses, and none at all when one of them is not public."""

    async def resolve(
        self, host: str, port: int = 0, family: socket.AddressFamily = socket.AF_UNSPEC
    ) -> list[ResolveResult]:
        loop = asyncio.get_running_loop()
        found = await loop.getaddrinfo(host, port, type=socket.SOCK_STREAM, family=family)
        addresses = {str(entry[4][0]): entry[0] for entry in found}
        for address in addresses:
            if not is_public(address):
                raise RequestError(f"{host} is at {address}, which is no public address")
        return [
            ResolveResult(
                hostname=host,
                host=address,
                port=port,
                family=kind,
                proto=0,
                flags=socket.AI_NUMERICHOST,
            )
            for address, kind in addresses.items()
        ]

    async def close(self) -> None:
        """Nothing is held."""


async def fetch(url: str, name: str, max_bytes: int) -> bytes:
    """What is at `url`, at most `max_bytes` of it within 20 s.

    RequestError for other schemes, addresses that are not public, errors and too much.
    """
    connector = aiohttp.TCPConnector(resolver=PublicResolver(), use_dns_cache=False)
    timeout = aiohttp.ClientTimeout(total=SECONDS)
    headers = {"Accept": "image/*", "Accept-Encoding": "identity"}
    try:
        async with aiohttp.ClientSession(
            connector=connector,
            timeout=timeout,
            headers=headers,
            cookie_jar=aiohttp.DummyCookieJar(),
        ) as session:
            for _ in range(MAX_REDIRECTS + 1):
                check_url(url, name)
                async with session.get(url, allow_redirects=False) as reply:
                    if reply.status in (301, 302, 303, 307, 308):
                        url = urljoin(url, reply.headers.get("Location", ""))
                        continue
                    return await _content(reply, name, max_bytes)
    except (aiohttp.ClientError, TimeoutError, OSError, ValueError) as error:
        raise RequestError(f"{name} cannot be fetched: {_reason(error)}") from error
    raise RequestError(f"{name} is redirected more than {MAX_REDIRECTS} times")


def check_url(url: str, name: str) -> None:
    """Before every request: http(s), no user name, and no literal address that is not public.
    Literal addresses do not pass through the resolver."""
    try:
        parts = urlsplit(url)
        host = parts.hostname or ""
    except ValueError as error:
        raise RequestError(f"{name} is not a URL: {error}") from error
    if parts.scheme not in ("http", "https") or not host or parts.username is not None:
        raise RequestError(f"{name} must be a plain http(s) URL")
    try:
        literal = is_public(host)
    except ValueError:
        return  # a name, which the resolver looks at
    if not literal:
        raise RequestError(f"{name}: {host} is no public address")


async def _content(reply: aiohttp.ClientResponse, name: str, max_bytes: int) -> bytes:
    if reply.status != 200:
        raise RequestError(f"{name} cannot be fetched: it answers {reply.status}")
    data = bytearray()
    async for chunk in reply.content.iter_chunked(CHUNK):
        data += chunk
        if len(data) > max_bytes:
            raise RequestError(f"{name} has more than {max_bytes / 1e6:.0f} MB")
    return bytes(data)


def _reason(error: BaseException) -> str:
    return "no answer in time" if isinstance(error, TimeoutError) else type(error).__name__
