"""The table of what the HTTP interface offers, and how a path finds its place in it.

One ``Endpoint`` is the only statement of a route: the router, the strict reading of its query and the OpenAPI
document are all made from it. A template's ``{name}`` stands for one segment, a last ``{name...}`` for the rest.
"""

from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass

from consensus.rejection import Reason, Rejected
from node.errors_http import JSON, HttpReply
from node.http_server import HttpRequest


@dataclass(frozen=True, slots=True)
class Call:
    """A request that has found its endpoint: values of the template's names, and its query's parameters."""

    request: HttpRequest
    path: Mapping[str, str]
    query: Mapping[str, str]


@dataclass(frozen=True, slots=True)
class Endpoint:
    """One method of one path. ``refusals`` are the statuses a refusal may have besides 400, 401 and 500."""

    method: str
    template: str
    summary: str
    answer: Callable[[Call], Awaitable[HttpReply]]
    query: tuple[str, ...] = ()
    body: str = ""
    status: int = 200
    content_type: str = JSON
    refusals: tuple[int, ...] = ()


class MethodNotAllowed(Exception):
    """The path is known, the method is not among ``allowed``."""

    def __init__(self, allowed: str) -> None:
        super().__init__(allowed)
        self.allowed = allowed


class Router:
    """Finds the endpoint of a path."""

    def __init__(self, endpoints: Sequence[Endpoint]) -> None:
        self.endpoints = tuple(endpoints)
        self._literal: dict[str, dict[str, Endpoint]] = {}
        self._templates: dict[tuple[str, ...], dict[str, Endpoint]] = {}
        for endpoint in endpoints:
            segments = tuple(endpoint.template.split("/"))
            if "{" in endpoint.template:
                self._templates.setdefault(segments, {})[endpoint.method] = endpoint
            else:
                self._literal.setdefault(endpoint.template, {})[endpoint.method] = endpoint

    def find(self, method: str, path: str) -> tuple[Endpoint, dict[str, str]]:
        """The endpoint and the values of its template's names. ``HEAD`` finds what ``GET`` does.

        Raises:
            Rejected: ``NOT_FOUND``.
            MethodNotAllowed.
        """
        methods, values = self._methods(path)
        endpoint = methods.get("GET" if method == "HEAD" else method)
        if endpoint is None:
            raise MethodNotAllowed(", ".join(sorted(methods)))
        return endpoint, values

    def _methods(self, path: str) -> tuple[dict[str, Endpoint], dict[str, str]]:
        literal = self._literal.get(path)
        if literal is not None:
            return literal, {}
        segments = path.split("/")
        for template, methods in self._templates.items():
            values = _match(template, segments)
            if values is not None:
                return methods, values
        raise Rejected(Reason.NOT_FOUND, f"nothing is at {path[:80]!r}")


def _match(template: tuple[str, ...], segments: list[str]) -> dict[str, str] | None:
    values: dict[str, str] = {}
    for position, part in enumerate(template):
        if part.endswith("...}"):
            rest = "/".join(segments[position:])
            return {**values, part[1:-4]: rest} if rest else None
        if position >= len(segments):
            return None
        if part.startswith("{"):
            if not segments[position]:
                return None
            values[part[1:-1]] = segments[position]
        elif part != segments[position]:
            return None
    return values if len(segments) == len(template) else None
