"""Everything about `patchsight-serve` that can be set. Flag `--max-batch`, variable `PATCHSIGHT_MAX_BATCH`, key
`max_batch` in the table `[serve]` of patchsight.toml."""

import ipaddress
import os
import re
from pathlib import Path
from typing import Annotated, ClassVar, Literal, Self

from pydantic import Field, SecretStr, field_validator, model_validator
from pydantic_settings import SettingsConfigDict

from patchsight_serve.config import CommandSettings
from patchsight_serve.manifest import default_repository

MEBIBYTE = 1024 * 1024
PREFIX = "patchsight"  # of the names of collections
Positive = Annotated[int, Field(gt=0)]
GRPC = re.compile(r"grpcs?://([A-Za-z0-9.-]+|\[[0-9A-Fa-f:]+\]):\d{1,5}")
MILVUS = re.compile(r"milvus(s?)://((?:[A-Za-z0-9.-]+|\[[0-9A-Fa-f:]+\]):\d{1,5})(?:/([A-Za-z][A-Za-z0-9]{0,62}))?/?")
ORIGIN = re.compile(r"https?://([a-z0-9.-]+|\[[0-9a-f:]+\])(:\d{1,5})?")
Seconds = Annotated[float, Field(gt=0, allow_inf_nan=False)]


def cores() -> int:
    return os.cpu_count() or 1


class ServeSettings(CommandSettings):
    """Serve the encoders of a model repository over HTTP: embeddings, attention and neighbors."""

    model_config = SettingsConfigDict(env_prefix="PATCHSIGHT_")
    table: ClassVar[str] = "serve"

    host: str = Field("127.0.0.1", description="address to listen on; beyond loopback, API keys are needed")
    processes: Positive = Field(
        1,
        description="processes that listen on the port, each with its own copy of the encoders unless Triton has them, "
        "and with its own limits; more than 1 serve no galleries unless a Milvus server has them",
    )
    port: int = Field(8000, ge=0, le=65535, description="port to listen on; 0 takes a free one")
    model_repository: Path = Field(
        default_factory=default_repository, description="folder with one encoder bundle per subfolder"
    )
    state_dir: Path = Field(
        Path("state"), description="folder that holds the galleries, and what trials of engines found"
    )
    gallery: str | None = Field(
        None,
        description="where the galleries are: milvus://HOST:PORT/NAME, milvuss:// for TLS, NAME begins the names of "
        "their collections; or the path of a file NAME.db, for milvus-lite (default: in the state_dir)",
    )
    gallery_token: SecretStr = Field(SecretStr(""), description="USER:PASSWORD, or the API key, of that Milvus")
    keep_originals: bool = Field(True, description="keep the encoded images in the galleries, for later encoders")
    exact_limit: Positive = Field(
        200_000,
        description="images of a gallery up to which a search compares with every one; among more it visits as many as "
        "find 0.99 of the neighbors",
    )
    sample_gallery: bool = Field(True, description="index the sample photos into a default gallery that is new")
    encoder: str | None = Field(
        None, description="the encoder of requests that name none (default: the one that sees the largest pictures)"
    )

    api_keys: SecretStr = Field(SecretStr(""), description="comma-separated; each opens everything, as a Bearer token")
    cors_origins: str = Field(
        "",
        description="comma-separated origins whose pages may call, https://HOST or with :PORT; * for all, needs keys",
    )
    allow_anonymous: bool = Field(False, description="listen beyond loopback without an API key")

    max_images: Positive = Field(64, description="images per request")
    max_image_bytes: Positive = Field(20 * MEBIBYTE, description="bytes of one encoded image")
    max_body_bytes: Positive = Field(64 * MEBIBYTE, description="bytes of a request's body")
    max_restore_bytes: Positive = Field(
        8 * 1024 * MEBIBYTE,
        description="bytes of a file that is restored or imported as a gallery; it goes to the disk",
    )
    max_pixels: Positive = Field(50_000_000, description="width x height of one image, read from its header")
    max_patches: Positive = Field(
        4096, description="patches of an image that is asked for at another size than the encoder's, `size=`"
    )
    max_batch: Positive | None = Field(
        None, description="images per run of an encoder (default: on a GPU 32, else one per thread and at least 4)"
    )
    max_queue: Positive = Field(256, description="images of all requests in work at once; more are answered with 429")
    max_wait_s: Seconds = Field(
        10.0, description="seconds that a request may have to wait for those before it, by the pace; else 429 at once"
    )

    max_connections: Positive = Field(1000, description="open connections; further ones are answered with 503")

    header_timeout_s: Seconds = Field(10.0, description="seconds for the head of a request to arrive")
    timeout_s: Seconds = Field(
        30.0,
        description="seconds for a body to arrive, again for its images to be encoded, and for the client to read on",
    )
    ready_age_s: Seconds = Field(5.0, description="/readyz trusts an inference this many seconds old, then runs one")
    batch_timeout_s: Seconds = Field(
        30.0, description="seconds of one run of an encoder, after which it hangs and the process ends with status 70"
    )
    drain_delay_s: float = Field(
        1.0, ge=0, description="seconds between /readyz turning 503 and the end of listening, for a load balancer"
    )
    drain_timeout_s: Positive = Field(30, description="seconds that requests in work have to finish at shutdown")

    triton: str | None = Field(
        None,
        description="grpc://HOST:PORT of an NVIDIA Triton that runs the encoders (default: this process does)",
    )
    triton_channels: Positive = Field(4, description="connections to Triton, for each encoder")
    triton_probe_s: Seconds = Field(0.5, description="seconds without an answer of Triton, after which it is probed")
    triton_shared_memory: bool = Field(True, description="share memory with a Triton on this host, for large calls")
    triton_start_s: Seconds = Field(30.0, description="seconds to wait for Triton at the start")

    device: Literal["cpu", "cuda"] = Field(
        "cpu", description="where the encoders run; cuda needs an NVIDIA GPU and pip install 'patchsight[gpu]'"
    )
    engine: Literal["auto", "onnxruntime", "openvino"] = Field(
        "auto",
        description="what runs the encoders on the CPU; auto: by a short trial at the first start, where "
        "pip install 'patchsight[openvino]' was run, else ONNX Runtime",
    )
    inference_precision: Literal["fp32", "bf16"] = Field(
        "fp32",
        description="bf16: by OpenVINO, on processors that have it; the embeddings of an encoder that would point "
        "elsewhere (cosine below 0.999) stay in fp32",
    )
    threads: Positive | None = Field(None, description="threads of one inference (default: one per core)")
    decode_threads: Positive = Field(
        default_factory=cores, description="images decoded at the same time (default: one per core)"
    )
    log_level: Literal["debug", "info", "warning", "error"] = Field("info", description="least severe line to log")
    log_format: Literal["text", "json"] = Field("text", description="json: one object per line")
    access_log: bool = Field(True, description="a line for each request, at level info; for probes at debug")

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.max_images > self.max_queue:
            raise ValueError(f"max_images {self.max_images} can never enter a queue of max_queue {self.max_queue}")
        if not (is_loopback(self.host) or self.keys or self.allow_anonymous):
            raise ValueError(
                f"host {self.host} is reachable from other machines and no API key is set: set PATCHSIGHT_API_KEYS, or "
                "PATCHSIGHT_ALLOW_ANONYMOUS=1 to let anybody in"
            )
        return self

    @model_validator(mode="after")
    def _origins_fit(self) -> Self:
        for origin in self.origins:
            if origin == "*":
                if not self.keys:
                    raise ValueError("cors_origins * without an API key would let every page that is looked at call")
            elif not ORIGIN.fullmatch(origin):
                raise ValueError(f"cors_origins has {origin!r}; an origin is https://HOST, or with :PORT, and no path")
        return self

    @model_validator(mode="after")
    def _engine_fits(self) -> Self:
        for flag, wanted in (("--engine", self.engine), ("--inference-precision", self.inference_precision)):
            if wanted not in ("openvino", "bf16"):
                continue
            if self.triton is not None:
                raise ValueError(f"{flag} {wanted} is for encoders in this process; with --triton, Triton runs them")
            if self.device != "cpu":
                raise ValueError(f"{flag} {wanted} is for --device cpu, not {self.device}")
        if self.inference_precision == "bf16" and self.engine == "onnxruntime":
            raise ValueError("--inference-precision bf16 needs OpenVINO: --engine auto or openvino")
        return self

    @field_validator("triton")
    @classmethod
    def _address(cls, value: str | None) -> str | None:
        if value is not None and not GRPC.fullmatch(value):
            raise ValueError("not the address of Triton's gRPC interface; write grpc://HOST:PORT, or grpcs:// for TLS")
        return value

    @field_validator("gallery")
    @classmethod
    def _gallery_address(cls, value: str | None) -> str | None:
        if value is None or MILVUS.fullmatch(value) or (value.endswith(".db") and "://" not in value):
            return value
        if "@" in value:
            raise ValueError("no place for a password: put USER:PASSWORD into PATCHSIGHT_GALLERY_TOKEN")
        raise ValueError("write milvus://HOST:PORT/NAME, NAME of letters and digits, or the path of a file NAME.db")

    @model_validator(mode="after")
    def _gallery_is_shared(self) -> Self:
        if self.gallery is not None and self.processes > 1 and not MILVUS.fullmatch(self.gallery):
            raise ValueError(f"a file of milvus-lite is for one process, not for {self.processes}; that takes a server")
        return self

    @property
    def milvus(self) -> tuple[str, str] | None:
        """Where the galleries are, if not in the state folder: what pymilvus calls the URI, and the prefix of names."""
        if self.gallery is None:
            return None
        found = MILVUS.fullmatch(self.gallery)
        return (f"http{found[1]}://{found[2]}", found[3] or PREFIX) if found else (self.gallery, PREFIX)

    @property
    def batch(self) -> int:
        """Images per run of an encoder. A core gains nothing by more: from 4 to 32 they cost it more cache misses."""
        if self.max_batch is not None:
            return self.max_batch
        return 32 if self.device == "cuda" else max(4, self.threads or cores())

    @property
    def keys(self) -> tuple[str, ...]:
        """The API keys; empty: everybody may call."""
        return tuple(key for key in (k.strip() for k in self.api_keys.get_secret_value().split(",")) if key)

    @property
    def origins(self) -> tuple[str, ...]:
        """The origins whose pages may call; empty: only the server's own."""
        return tuple(origin for origin in (o.strip() for o in self.cors_origins.split(",")) if origin)


def is_loopback(host: str) -> bool:
    """Only this machine can reach the address. A name other than `localhost` is not trusted to stay one."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
