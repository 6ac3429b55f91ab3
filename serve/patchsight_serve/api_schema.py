"""The OpenAPI schema as the server tells it: what FastAPI finds out, and examples, which fit one another."""

from typing import Any

from fastapi import FastAPI

_SHA256 = "e42b13bfdb516ffbcdd08f3565339e2f96ff8943366af22493990abaeaf7dd37"
_NAME = "simclr-vit-tiny-photos"
_ENCODER = {"name": _NAME, "sha256": _SHA256}
_IMAGE = {"id": "shoes-1", "label": "shoes", "metadata": {"year": 2010}, "sha256": "9f" * 32}
_PACKED = {"shape": [1, 2], "dtype": "float32", "data": "AACAPgAAQD8="}
_REEMBEDDING = {
    "encoder": {"name": "simclr-vit-photos", "sha256": "5c" * 32}, "done": 120, "total": 200, "failed": [],
    "error": None,
}  # fmt: skip
_INFO = {
    "name": _NAME, "sha256": _SHA256, "default": True, "outputs": {"embedding": [384], "attention": [3, 8, 8]},
    "runtime": {"engine": "onnxruntime", "precision": "fp32", "cosine": None},
    "manifest": {"architecture": "ViT-Tiny", "recommended": "both", "…": "all of encoder.json"},
}  # fmt: skip
_MODEL = {"id": _NAME, "object": "model", "created": 0, "owned_by": "patchsight"}
_FOUND = {"id": "shoes-04", "score": 0.5398, "label": "shoes", "metadata": {}}

# By the name that a parameter has everywhere, where its own declaration gives none.
PARAMETERS: dict[str, Any] = {
    "encoder": _NAME, "name": _NAME, "model": _NAME, "gallery": "mine", "id": "shoes-1", "label": "shoes",
    "metadata": '{"year": 2010}', "priority": "bulk", "cursor": "", "k": 5, "min_size": 5,
}  # fmt: skip

# By the name of a reply's model.
REPLIES: dict[str, Any] = {
    "EmbedReply": {"encoder": _ENCODER, "results": [{"index": 0, "embedding": [-0.0338, -0.0514, 0.011]}]},
    "AttentionReply": {"encoder": _ENCODER, "attention": _PACKED},
    "EncoderInfo": _INFO,
    "EncoderList": {"encoders": [_INFO], "failed": {}},
    "GalleryInfo": {
        "gallery": "mine", "count": 200, "encoder": _ENCODER, "damaged": [], "galleries": ["default", "mine"],
        "index": {"kind": "flat", "recall": None, "lists": None, "probes": None, "building": False},
        "reembedding": _REEMBEDDING,
    },
    "GalleriesReply": {"galleries": [{"name": "default", "count": 200, "encoder": _ENCODER}]},
    "AddReply": {"results": [{"index": 0, "id": "shoes-1", "created": True}]},
    "GalleryImage": _IMAGE,
    "ImagePage": {"images": [_IMAGE], "next_cursor": None},
    "RestoreReply": {"gallery": "twin", "count": 200, "encoder": _ENCODER, "left_out": []},
    "ImportReply": {
        "gallery": "mine", "count": 200, "encoder": _ENCODER, "created": 180, "replaced": 0, "unchanged": 20,
    },
    "Reembedding": _REEMBEDDING,
    "NeighborsReply": {
        "encoder": _ENCODER, "neighbors": [_FOUND], "vote": {"label": "shoes", "confidence": 0.5679},
    },
    "RegionReply": {
        "encoder": _ENCODER, "neighbors": [{**_FOUND, "box": [0.25, 0.125, 0.625, 0.5]}], "looked_at": 200,
        "without_original": 0, "unreadable": 0,
    },
    "DuplicatesReply": {
        "encoder": _ENCODER, "images": 200, "total": 1, "next_cursor": None,
        "groups": [{"id": "shoes-1", "size": 2, "members": [
            {"id": "shoes-1", "label": "shoes", "score": 1.0, "copy_of": None},
            {"id": "shoes-2", "label": "shoes", "score": 1.0, "copy_of": "shoes-1"},
        ]}],
    },
    "ClustersReply": {
        "encoder": _ENCODER, "images": 200, "unclustered": 0,
        "clusters": [{"size": 31, "labels": [{"label": "shoes", "count": 29}],
                      "typical": [{"id": "shoes-04", "label": "shoes", "score": 0.83}]}],
    },
    "MapReply": {
        "encoder": _ENCODER, "method": "pca", "umap": {"state": "working", "error": None}, "images": 200, "shown": 3,
        "ids": ["shoes-04", "dress-11", "hat-02"], "labels": ["shoes", "dress", None], "xs": [0.0, 0.61803, 1.0],
        "ys": [0.40821, 0.29017, 0.70983],
    },
    "EmbeddingList": {
        "object": "list", "data": [{"object": "embedding", "index": 0, "embedding": [-0.0338, -0.0514, 0.011]}],
        "model": _NAME, "usage": {"prompt_tokens": 1, "total_tokens": 1},
    },
    "Model": _MODEL,
    "ModelList": {"object": "list", "data": [_MODEL]},
    "Alive": {"status": "alive"},
    "Ready": {"status": "ready"},
    "ErrorReply": {"error": {"code": "not_found", "message": "no gallery 'mine'", "param": "gallery"}},
}  # fmt: skip


def document(app: FastAPI) -> None:
    """Have the application's schema tell of examples, and of the key, which the middleware checks, so that the page
    offers a field for it."""
    generate = app.openapi

    def documented() -> dict[str, Any]:
        schema = generate()
        models = schema.setdefault("components", {}).setdefault("schemas", {})
        for name, example in REPLIES.items():
            if name in models:
                models[name]["examples"] = [example]
        for operations in schema["paths"].values():
            for operation in operations.values():
                for parameter in operation.get("parameters", ()):
                    _give_example(parameter["name"], parameter["schema"])
        schema["components"]["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
        schema["security"] = [{}, {"key": []}]
        return schema

    app.openapi = documented  # type: ignore[method-assign]


def _give_example(name: str, schema: dict[str, Any]) -> None:
    if "examples" in schema or name not in PARAMETERS:
        return
    several = any(kind.get("type") == "array" for kind in (schema, *schema.get("anyOf", ())))
    schema["examples"] = [[PARAMETERS[name]] if several else PARAMETERS[name]]
