"""The tokenizer of a checkpoint: its ids, its template, and what is said where there is none."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from ernie_quant.calibration import tokenizer as module
from ernie_quant.calibration.tokenizer import tokenizer_of
from helpers.words import EOS_ID, byte_tokenizer

from ernie_quant.errors import TextError

SAID = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]


def test_ids_of_a_text(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = tokenizer_of(byte_tokenizer(tmp_path))
    assert found.ids("a 二\n") == list("a 二\n".encode())
    assert found.eos == EOS_ID
    assert len(found.ids("a" * 2_000_000)) == 2_000_000
    assert capsys.readouterr() == ("", "")


def test_conversations(tmp_path: Path) -> None:
    plain = tokenizer_of(byte_tokenizer(tmp_path))
    assert plain.chat(SAID) == "user: hi\nassistant: ho\n"
    template = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
    assert tokenizer_of(byte_tokenizer(tmp_path, template)).chat(SAID) == "<user>hi<assistant>ho"
    picky = tokenizer_of(byte_tokenizer(tmp_path, "{{ raise_exception('system first') }}"))
    with pytest.raises(TextError, match="chat template does not take 'user' first: system first"):
        picky.chat(SAID)


def test_no_code_of_a_checkpoint_is_run(tmp_path: Path) -> None:
    byte_tokenizer(tmp_path)
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    auto_map = {"AutoTokenizer": ["evil.Tokenizer", None], "AutoConfig": "evil.Config"}
    (tmp_path / "tokenizer_config.json").write_text(
        json.dumps(config | {"auto_map": auto_map, "tokenizer_class": "Ernie4_5_Tokenizer"})
    )
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "ernie4_5_moe", "auto_map": auto_map}))
    (tmp_path / "evil.py").write_text("raise SystemExit('this was run')")
    assert tokenizer_of(tmp_path).ids("ab") == [97, 98]


def test_no_tokenizer(tmp_path: Path) -> None:
    with pytest.raises(TextError, match=r"has no tokenizer \(looked for tokenizer\.json, tokenizer\.model\)"):
        tokenizer_of(tmp_path)


def test_a_damaged_tokenizer(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(TextError, match="its tokenizer cannot be loaded: ") as error:
        tokenizer_of(tmp_path)
    assert "\n" not in str(error.value)


def test_a_library_that_is_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_installed", lambda name: name == "transformers")
    (tmp_path / "tokenizer.model").write_bytes(b"")
    with pytest.raises(TextError, match=r"needs sentencepiece and google\.protobuf: pip install 'transformers>=.+' 'sentence"):
        tokenizer_of(tmp_path)
    monkeypatch.setattr(module, "_installed", lambda _: False)
    with pytest.raises(TextError, match="needs transformers: pip install"):
        tokenizer_of(byte_tokenizer(tmp_path))


def test_a_sentencepiece_model(tmp_path: Path) -> None:
    """As ERNIE's repositories have it: tokenizer.model, and a class that transformers does not know."""
    sentencepiece = pytest.importorskip("sentencepiece")
    pytest.importorskip("google.protobuf")
    text = Path(__file__).read_text().replace("</s>", "")
    (tmp_path / "text").write_text(text)
    sentencepiece.SentencePieceTrainer.train(
        input=str(tmp_path / "text"), model_prefix=str(tmp_path / "tokenizer"), vocab_size=400, model_type="bpe",
        byte_fallback=True, add_dummy_prefix=False, normalization_rule_name="identity", remove_extra_whitespaces=False,
    )  # fmt: skip
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "Ernie4_5_Tokenizer", "eos_token": "</s>"}))
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "ernie4_5_moe"}))
    found = tokenizer_of(tmp_path)
    assert found.ids(text) == sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "tokenizer.model")).encode(text)
    assert found.eos == 2
