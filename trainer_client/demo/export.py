"""Writes the demonstration's sources as files, each where its owner would keep it.

::

    python -m trainer_client.demo.export --library NAME --press NAME --out DIR

makes ``DIR/<owner>/sources/<source>.txt`` (its examples one after the other, all of one length) and
``DIR/corpus.json``, which says what each owner claims and which sources play a part, and ``DIR/public.txt``, text that
no source holds. For a process that must not import torch or this package; the job itself uses ``corpus.py`` directly.
"""

import argparse
import json
from pathlib import Path

from trainer_client.demo.corpus import RECORD_BYTES, Corpus, Source, base_text, demonstration_corpus


def export(corpus: Corpus, directory: Path) -> None:
    """Write every source, ``corpus.json`` and ``public.txt`` below ``directory``."""
    for source in corpus.sources:
        path = directory / _place(source)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"".join(source.examples))
    (directory / "public.txt").write_bytes(base_text())
    (directory / "corpus.json").write_text(json.dumps(described(corpus), indent=2) + "\n", encoding="utf-8")


def described(corpus: Corpus) -> dict[str, object]:
    """``corpus.json``."""
    return {
        "example_bytes": RECORD_BYTES,
        "licence_refused": corpus.licence_refused,
        "purpose_refused": corpus.purpose_refused,
        "revoked": corpus.revoked,
        "canary": corpus.canary,
        "sources": [
            {
                "name": source.name,
                "owner": source.owner,
                "file": _place(source),
                "licence": source.licence,
                "rights_basis": source.rights_basis,
                "purposes": list(source.purposes),
                "content_class": source.content_class,
                "reserve": source.reserve,
            }
            for source in corpus.sources
        ],
    }


def _place(source: Source) -> str:
    return f"{source.owner}/sources/{source.name}.txt"


def main(arguments: list[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m trainer_client.demo.export", description="Write the sources.")
    parser.add_argument("--library", required=True, help="member that owns the first four sources")
    parser.add_argument("--press", required=True, help="member that owns the other four")
    parser.add_argument("--out", type=Path, required=True, help="directory of the consortium")
    options = parser.parse_args(arguments)
    export(demonstration_corpus(options.library, options.press), options.out)


if __name__ == "__main__":
    main()
