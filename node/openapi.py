"""The OpenAPI 3.1 document of the HTTP interface, made from its endpoints."""

from collections.abc import Sequence

from consensus.rejection import Reason
from node.endpoints import Endpoint
from node.errors_http import JSON, HttpFault

_MEANINGS = {
    400: "The request or what it carries is malformed.",
    401: "No token of this node's.",
    404: "Not here.",
    408: "The body did not arrive in time.",
    409: "A rule refuses it at this state of the log.",
    413: "The body is too large.",
    429: "Too much waits; retry after the seconds in Retry-After.",
    500: "A fault of the node's own.",
    503: "Not ready; retry after the seconds in Retry-After.",
}
_PARAMETERS: dict[str, tuple[str, dict[str, object]]] = {
    "wait": ("Seconds to wait for finality, at most 60.", {"type": "number", "minimum": 0, "maximum": 60}),
    "kind": ("Only events of this kind.", {"type": "string"}),
    "challenge": ("Event id of an audit challenge.", {"type": "string", "pattern": "^[0-9a-f]{64}$"}),
    "campaign": ("A campaign id.", {"type": "string", "pattern": "^[0-9a-f]{64}$"}),
    "source": ("A source id.", {"type": "string", "pattern": "^[0-9a-f]{64}$"}),
    "event": ("An event id.", {"type": "string", "pattern": "^[0-9a-f]{64}$"}),
    "id": ("An id.", {"type": "string", "pattern": "^[0-9a-f]{64}$"}),
    "key": ("A key of the state map.", {"type": "string", "pattern": "^[0-9a-f]{66}$"}),
    "start": ("Lowest log index to list.", {"type": "integer", "minimum": 0}),
    "limit": ("At most so many.", {"type": "integer", "minimum": 1, "maximum": 1000}),
    "proof": ("1: with its proof.", {"type": "string", "enum": ["1"]}),
    "first": ("Size of the older log.", {"type": "integer", "minimum": 0}),
    "second": ("Size of the newer log.", {"type": "integer", "minimum": 0}),
    "size": ("Size of a log seen before, which the bundle is to continue.", {"type": "integer", "minimum": 1}),
    "earlier": ("Height of the older ledger block.", {"type": "integer", "minimum": 1}),
    "predicate": ("A predicate.", {"type": "string"}),
    "root": ("Root of a window of accumulators.", {"type": "string", "pattern": "^[0-9a-f]{64}$"}),
    "sha256": ("SHA-256 of a file.", {"type": "string", "pattern": "^[0-9a-f]{64}$"}),
    "offset": ("Where the part begins, in bytes; 0 without it.", {"type": "integer", "minimum": 0}),
    "place": ("A C2SP tile path: LEVEL/INDEX[.p/WIDTH] or entries/INDEX[.p/WIDTH].", {"type": "string"}),
}


def document(endpoints: Sequence[Endpoint], version: str) -> dict[str, object]:
    """The document as JSON values."""
    paths: dict[str, dict[str, object]] = {}
    for endpoint in endpoints:
        template = endpoint.template.replace("...}", "}")
        paths.setdefault(template, {})[endpoint.method.lower()] = _operation(endpoint)
    return {
        "openapi": "3.1.0",
        "info": {"title": "Countersign node", "version": version},
        "security": [{"token": []}, {}],
        "paths": paths,
        "components": {
            "securitySchemes": {"token": {"type": "http", "scheme": "bearer"}},
            "schemas": {
                "Refusal": {
                    "type": "object",
                    "required": ["error", "detail"],
                    "properties": {
                        "error": {"type": "string", "enum": [*map(str, Reason), *map(str, HttpFault)]},
                        "detail": {"type": "string"},
                    },
                }
            },
        },
    }


def _operation(endpoint: Endpoint) -> dict[str, object]:
    names = [part[1:-1].removesuffix("...") for part in endpoint.template.split("/") if part.startswith("{")]
    statuses = sorted({400, 401, 500, *endpoint.refusals, *((408, 413, 429) if endpoint.body else ())})
    operation: dict[str, object] = {
        "summary": endpoint.summary,
        "parameters": [
            *(_parameter(name, "path") for name in names),
            *(_parameter(name, "query") for name in endpoint.query),
        ],
        "responses": {
            str(endpoint.status): {"description": "Done.", "content": {_media(endpoint.content_type): {}}},
            **{str(status): _refusal(status) for status in statuses},
        },
    }
    if endpoint.body:
        operation["requestBody"] = {"required": True, "content": {endpoint.body: {}}}
    return operation


def _parameter(name: str, place: str) -> dict[str, object]:
    description, schema = _PARAMETERS[name]
    return {"name": name, "in": place, "required": place == "path", "description": description, "schema": schema}


def _refusal(status: int) -> dict[str, object]:
    return {
        "description": _MEANINGS[status],
        "content": {JSON: {"schema": {"$ref": "#/components/schemas/Refusal"}}},
    }


def _media(content_type: str) -> str:
    return content_type.partition(";")[0]
