"""Which encoders does a Triton serve? Asked when the gateway starts, and when it reloads."""

import asyncio
import logging
import time
from collections.abc import Mapping

from patchsight_serve.encoder import RemoteEncoder
from patchsight_serve.errors import BundleError, DeadlineExceeded, NotReady
from patchsight_serve.manifest import Manifest
from patchsight_serve.triton_client import CALL_S, Triton

logger = logging.getLogger(__name__)

PAUSE_S = 0.5


def find_encoders(address: str, wait_s: float) -> dict[str, RemoteEncoder]:
    """The encoders on the Triton at `address`, by name. It and its models may take up to `wait_s` seconds to come up:
    gateway and server start in any order.

    Raises:
        BundleError: no Triton answers, it has no encoder of ours, or one's config contradicts its manifest.
    """
    found = asyncio.run(_manifests(address, wait_s))
    return {name: RemoteEncoder(manifest, address) for name, manifest in found.items()}


def changes(address: str, known: Mapping[str, Manifest]) -> dict[str, RemoteEncoder | None]:
    """As `reload.Source`: what the Triton at `address` serves now, beside what is known of it. Raises BundleError."""
    found = find_encoders(address, 0.0)
    return {name: None if encoder.manifest == known.get(name) else encoder for name, encoder in found.items()}


async def _manifests(address: str, wait_s: float) -> dict[str, Manifest]:
    ends = time.monotonic() + wait_s
    async with Triton(address) as triton:
        while True:
            try:
                found, problem = await triton.manifests(CALL_S), "none of its loaded models is an encoder of patchsight"
                if found:
                    return found
            except (NotReady, DeadlineExceeded) as error:
                problem = error.message
            if time.monotonic() + PAUSE_S > ends:
                raise BundleError(
                    f"--triton {address}: {problem}; Triton has to serve a folder that patchsight-export or "
                    "`patchsight-models triton` wrote"
                )
            logger.info("waiting for Triton at %s: %s", address, problem)
            await asyncio.sleep(PAUSE_S)
