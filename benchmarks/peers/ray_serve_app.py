# mypy: disable-error-code="import-not-found,misc,untyped-decorator,no-any-return,attr-defined,type-arg"
"""Ray Serve: a deployment with one replica and `@serve.batch`; over `max_queued_requests` it answers 503.

On one node with one core, without the dashboard. A replica takes as many requests at once as fill two batches, so that
one can be gathered while the other runs.
"""

import os
import sys

import ray
from bare_encoder import BareEncoder
from ray import serve
from starlette.requests import Request

BATCH, QUEUE = int(os.environ["PEER_BATCH"]), int(os.environ["PEER_QUEUE"])


@serve.deployment(max_ongoing_requests=2 * BATCH, max_queued_requests=QUEUE)
class Embedder:
    def __init__(self) -> None:
        self.encoder = BareEncoder.of_environment()

    @serve.batch(max_batch_size=BATCH, batch_wait_timeout_s=0.01)
    async def embed(self, photos: list[bytes]) -> list[list[float]]:
        vectors: list[list[float]] = self.encoder.embed([self.encoder.pixels(photo) for photo in photos]).tolist()
        return vectors

    async def __call__(self, request: Request) -> dict[str, list[float]]:
        return {"embedding": await self.embed(await request.body())}


if __name__ == "__main__":
    ray.init(num_cpus=1, include_dashboard=False, object_store_memory=100 * 2**20)
    serve.start(http_options={"host": "127.0.0.1", "port": int(sys.argv[1])})
    serve.run(Embedder.bind(), route_prefix="/embed", blocking=True, logging_config={"enable_access_log": False})
