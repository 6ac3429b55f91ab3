"""What a client says to a server about its galleries: as `client_protocol`, without a socket."""

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import orjson

from patchsight_serve.client_files import check_source, check_target
from patchsight_serve.client_images import Picture, cut, weight
from patchsight_serve.client_protocol import Conversation, encoded_all, good
from patchsight_serve.client_steps import JSON, Call, Steps, Work, named
from patchsight_serve.errors import DamagedFile, InvalidRequest, PatchsightError, TooLarge
from patchsight_serve.group import Cluster, GalleryMap, Group, LabelCount, Member, Typical
from patchsight_serve.item import Added, Neighbor, RegionNeighbor

SQLITE, PARQUET = "application/vnd.sqlite3", "application/vnd.apache.parquet"
File = str | os.PathLike[str]
New = tuple[Picture, Mapping[str, Any]]  # for a gallery, with `id`, `label` and `metadata`, as far as it has them


class GalleryConversation(Conversation):
    """With one server, about one encoder of it and all galleries."""

    def new_batches(self, images: Iterable[New]) -> Iterator[list[New]]:
        """Cut by number and by bytes."""
        return cut(images, self._batch, self._batch_bytes, lambda new: weight(new[0]))

    def add(self, images: Sequence[New], query: Mapping[str, object]) -> Steps[list[Added | PatchsightError]]:
        """To a gallery: one result per image, in order."""
        data = yield from encoded_all([picture for picture, _ in images], None)
        sound = [(d, item) for d, (_, item) in zip(data, images, strict=True) if isinstance(d, bytes)]
        results = iter((yield from self._add(sound, query)) if sound else ())
        return [d if isinstance(d, PatchsightError) else next(results) for d in data]

    def _add(
        self, images: Sequence[tuple[bytes, Mapping[str, Any]]], query: Mapping[str, object]
    ) -> Steps[list[Added | PatchsightError]]:
        items = orjson.dumps([item for _, item in images]).decode()
        call = Call("POST", "/gallery/images", _said(query), JSON, [data for data, _ in images], {"items": items})
        try:
            results = (yield from self._ask(call)).json()["results"]
        except PatchsightError as error:
            if len(images) == 1 and _is_about_image(error):
                return [error]
            if not isinstance(error, TooLarge):
                raise
            middle = len(images) // 2  # the server allows fewer images or bytes than we thought
            return (yield from self._add(images[:middle], query)) + (yield from self._add(images[middle:], query))
        return [named(**r["error"]) if "error" in r else Added(r["id"], r["created"]) for r in results]

    def gallery(self, query: Mapping[str, object]) -> Steps[dict[str, Any]]:
        """What `GET /gallery` tells."""
        found: dict[str, Any] = (yield from self._ask(Call("GET", "/gallery", _said(query)))).json()
        return found

    def galleries(self) -> Steps[list[dict[str, Any]]]:
        """What `GET /galleries` tells."""
        found: list[dict[str, Any]] = (yield from self._ask(Call("GET", "/galleries"))).json()["galleries"]
        return found

    def page(self, query: Mapping[str, object]) -> Steps[dict[str, Any]]:
        """What `GET /gallery/images` tells."""
        found: dict[str, Any] = (yield from self._ask(Call("GET", "/gallery/images", _said(query)))).json()
        return found

    def neighbors(self, picture: Picture | str, by_id: bool, query: Mapping[str, object]) -> Steps[list[Neighbor]]:
        """Of a picture, or of the indexed image of that id."""
        said = _said(query)
        if by_id:
            call = Call("GET", "/neighbors", said | {"id": str(picture)})
        else:
            call = Call("POST", "/neighbors", said, JSON, good((yield from encoded_all([picture], None))))
        return [Neighbor(**found) for found in (yield from self._ask(call)).json()["neighbors"]]

    def neighbors_each(
        self, pictures: Sequence[Picture], query: Mapping[str, object]
    ) -> Steps[list[list[Neighbor] | PatchsightError]]:
        """One result per picture, in order."""
        results: list[list[Neighbor] | PatchsightError] = []
        for picture in pictures:
            try:
                results.append((yield from self.neighbors(picture, False, query)))
            except PatchsightError as error:
                if not _is_about_image(error):
                    raise
                results.append(error)
        return results

    def region(
        self, picture: Picture | str, by_id: bool, box: Sequence[float], query: Mapping[str, object]
    ) -> Steps[list[RegionNeighbor]]:
        """Images that contain a region of a picture, or of the indexed image of that id."""
        said = _said(query) | {"box": ",".join(str(float(edge)) for edge in box)}
        if by_id:
            call = Call("GET", "/neighbors/region", said | {"id": str(picture)})
        else:
            call = Call("POST", "/neighbors/region", said, JSON, good((yield from encoded_all([picture], None))))
        found = (yield from self._ask(call)).json()["neighbors"]
        return [RegionNeighbor(**{**neighbor, "box": tuple(neighbor["box"])}) for neighbor in found]

    def duplicates(self, query: Mapping[str, object]) -> Steps[list[Group]]:
        """Page after page, up to `limit` groups if that is asked for."""
        said, groups = _said(query), []
        while True:
            page = (yield from self._ask(Call("GET", "/gallery/duplicates", said))).json()
            groups += [Group(g["id"], g["size"], [Member(**m) for m in g["members"]]) for g in page["groups"]]
            if "limit" in query or page["next_cursor"] is None:
                return groups
            said = said | {"cursor": page["next_cursor"]}

    def clusters(self, query: Mapping[str, object]) -> Steps[list[Cluster]]:
        """All of a gallery."""
        call = Call("GET", "/gallery/clusters", _said(query))
        return [
            Cluster(c["size"], [LabelCount(**count) for count in c["labels"]], [Typical(**t) for t in c["typical"]])
            for c in (yield from self._ask(call)).json()["clusters"]
        ]

    def map(self, query: Mapping[str, object]) -> Steps[GalleryMap]:
        """Of a gallery."""
        found = (yield from self._ask(Call("GET", "/gallery/map", _said(query)))).json()
        positions = np.array([found["xs"], found["ys"]], np.float32).T
        state = found["umap"]["state"]
        return GalleryMap(found["method"], state, found["images"], found["ids"], found["labels"], positions)

    def backup(self, to: File, query: Mapping[str, object]) -> Steps[None]:
        """A gallery as an SQLite file."""
        return self._download("/gallery/backup", SQLITE, to, query)

    def restore(self, file: File, query: Mapping[str, object]) -> Steps[dict[str, Any]]:
        """A gallery from such a file: what `POST /gallery/restore` tells."""
        return self._upload("/gallery/restore", file, query, repeatable=False)

    def export(self, to: File, query: Mapping[str, object]) -> Steps[None]:
        """A gallery as a Parquet file."""
        return self._download("/gallery/export", PARQUET, to, query)

    def import_file(self, file: File, query: Mapping[str, object]) -> Steps[dict[str, Any]]:
        """Such a file into a gallery: what `POST /gallery/import` tells."""
        return self._upload("/gallery/import", file, query, repeatable=True)

    def _download(self, path: str, kind: str, to: File, query: Mapping[str, object]) -> Steps[None]:
        """A gallery as a file of that kind."""
        target = Path(to)
        yield Work(lambda: check_target(target))
        yield from self._ask(Call("GET", path, _said(query), kind, to=target))

    def _upload(self, path: str, file: File, query: Mapping[str, object], repeatable: bool) -> Steps[dict[str, Any]]:
        """A file to a gallery: what the server tells of it. Errors that are about the file name it."""
        source = Path(file)
        size: int = yield Work(lambda: check_source(source))
        call = Call("POST", path, _said(query), body=source, size=size, repeatable=repeatable)
        try:
            told: dict[str, Any] = (yield from self._ask(call)).json()
        except (InvalidRequest, TooLarge, DamagedFile) as error:
            error.message = f"{source}: {error.message}"
            error.args = (error.message,)
            raise
        return told

    def remove(self, query: Mapping[str, object]) -> Steps[None]:
        """A whole gallery."""
        yield from self._ask(Call("DELETE", "/gallery", _said(query), repeatable=False))

    def reembed(self, encoder: str, query: Mapping[str, object]) -> Steps[dict[str, Any]]:
        """What `POST /gallery/reembed` tells."""
        call = Call("POST", "/gallery/reembed", _said({**query, "encoder": encoder}), repeatable=False)
        told: dict[str, Any] = (yield from self._ask(call)).json()
        return told


def _said(query: Mapping[str, object]) -> dict[str, str | list[str]]:
    """As the server reads it: a filter as JSON, several labels one by one; None is not said."""
    said: dict[str, str | list[str]] = {}
    for name, value in query.items():
        if name == "filter" and isinstance(value, Mapping):
            try:
                said[name] = orjson.dumps(value).decode()
            except TypeError as error:
                raise InvalidRequest(f"filter cannot be written as JSON: {error}", "filter") from None
        elif isinstance(value, list | tuple | set | frozenset):
            if not value:  # which a query string cannot say: it would be as if nothing had been chosen
                raise InvalidRequest(f"{name} is empty: there is nothing to choose from", name)
            said[name] = [str(one) for one in value]
        elif value is not None:
            said[name] = str(value)
    return said


def _is_about_image(error: PatchsightError) -> bool:
    """Whether an error that a request with one image got is that of the image."""
    about = error.param or ""
    return about in ("id", "label", "metadata", "items") or about.startswith("images[") or isinstance(error, TooLarge)
