"""The demonstration's sources as files: what the owners measure is what the job trains on."""

import json
from pathlib import Path

import pytest

from node.demo.consortium import read_corpus
from trainer_client.demo.corpus import RECORD_BYTES, demonstration_corpus
from trainer_client.demo.export import main


def test_exported_files_hold_the_examples_in_order_and_their_description(tmp_path: Path) -> None:
    main(["--library", "library", "--press", "press", "--out", str(tmp_path)])
    corpus = demonstration_corpus("library", "press")
    described = read_corpus(tmp_path)
    assert described.example_bytes == RECORD_BYTES
    assert [source.name for source in described.sources] == [source.name for source in corpus.sources]
    for source in described.sources:
        expected = corpus.source(source.name)
        assert (tmp_path / source.file).read_bytes() == b"".join(expected.examples)
        assert (source.owner, source.licence, source.purposes) == (expected.owner, expected.licence, expected.purposes)
        assert source.reserve == expected.reserve
    assert described.revoked == corpus.revoked
    public = (tmp_path / "public.txt").read_bytes()
    assert len(public) > 40 * RECORD_BYTES
    assert not any(example in public for source in corpus.sources for example in source.examples)


def test_export_needs_an_owner_for_every_source(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["--library", "library", "--out", "nowhere"])
    assert stopped.value.code == 2
    assert "--press" in capsys.readouterr().err


def test_description_is_json_that_names_no_example(tmp_path: Path) -> None:
    main(["--library", "library", "--press", "press", "--out", str(tmp_path)])
    document = json.loads((tmp_path / "corpus.json").read_text(encoding="utf-8"))
    assert {"licence_refused", "purpose_refused", "revoked", "canary"} <= set(document)
    assert "Tomas Eklund" not in json.dumps(document)
