"""`python -m lightx2v_core.api_server`: LightX2V's HTTP service."""

from __future__ import annotations

import asyncio
import logging
import sys
from collections.abc import Sequence
from importlib.util import find_spec

from ..errors import CapabilityError, LightX2VError
from .options import parse

PACKAGES = {"aiohttp": "aiohttp", "prometheus_client": "prometheus-client"}


def main(arguments: Sequence[str] | None = None) -> int:
    """0 after a graceful stop, 1 after an error in words."""
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(message)s")
    try:
        options = parse(arguments)
        _check_packages()
        from .run import serve

        asyncio.run(serve(options))
    except LightX2VError as error:
        logging.getLogger(__name__).error("%s", error)
        return 1
    return 0


def _check_packages() -> None:
    missing = [name for module, name in PACKAGES.items() if find_spec(module) is None]
    if missing:
        raise CapabilityError(
            f"the service needs packages that are not installed here ({', '.join(missing)}): "
            "pip install -r requirements-service.txt"
        )


if __name__ == "__main__":
    sys.exit(main())
