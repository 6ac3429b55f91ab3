"""Every error this project raises on purpose, drawn as a tree.

    PatchsightError                    500 internal
    ├── InvalidRequest                 400 malformed or out of range
    ├── Unauthorized                   401
    ├── Forbidden                      403 a page of another origin
    ├── NotFound                       404 unknown encoder, gallery or id
    ├── RequestTimeout                 408 a head that does not come to its end
    ├── Conflict                       409 other bytes, or another encoder, under the same name
    │   └── Superseded                 409 the gallery was exchanged while a request used it
    ├── TooLarge                       413 over a limit: bytes, pixels, images
    ├── UnsupportedImage               415 not an image format we read
    ├── DamagedImage                   422 right format, broken content
    ├── DamagedFile                    422 the same, of a gallery's backup
    ├── Overloaded                     429 queue full; carries `retry_after_s`
    │   └── TooManyConnections         503
    ├── HeadTooLarge                   431 the request's line and headers
    ├── NotReady                       503 starting, draining, or a dead worker
    ├── DeadlineExceeded               504
    ├── StorageFull                    507
    └── BundleError                    an encoder bundle that is missing, damaged or not ours

The messages are written for the person who sent the input: they name the offending value and the limit.
"""


class PatchsightError(Exception):
    """Base of all errors raised on purpose; `status` is the HTTP status, `code` its stable machine name."""

    status = 500
    code = "internal"

    def __init__(self, message: str, param: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.param = param


class InvalidRequest(PatchsightError):
    status, code = 400, "invalid_request"


class Unauthorized(PatchsightError):
    status, code = 401, "unauthorized"


class Forbidden(PatchsightError):
    status, code = 403, "forbidden"


class NotFound(PatchsightError):
    status, code = 404, "not_found"


class RequestTimeout(PatchsightError):
    status, code = 408, "request_timeout"


class Conflict(PatchsightError):
    status, code = 409, "conflict"


class Superseded(Conflict):
    code = "superseded"


class TooLarge(PatchsightError):
    status, code = 413, "too_large"


class UnsupportedImage(PatchsightError):
    status, code = 415, "unsupported_image"


class DamagedImage(PatchsightError):
    status, code = 422, "damaged_image"


class DamagedFile(PatchsightError):
    status, code = 422, "damaged_file"


class Overloaded(PatchsightError):
    status, code = 429, "overloaded"

    def __init__(self, message: str, retry_after_s: int = 1) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class TooManyConnections(Overloaded):
    status, code = 503, "too_many_connections"


class HeadTooLarge(PatchsightError):
    status, code = 431, "head_too_large"


class NotReady(PatchsightError):
    status, code = 503, "not_ready"


class DeadlineExceeded(PatchsightError):
    status, code = 504, "deadline_exceeded"


class StorageFull(PatchsightError):
    status, code = 507, "storage_full"


class BundleError(PatchsightError):
    status, code = 500, "bad_bundle"
