import io
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from dash_train.data.config import TokenizerConfig
from dash_train.data.errors import DataError
from dash_train.data.tokenizer import (
    HuggingFaceTokenizer,
    SentencePieceTokenizer,
    Tokenizer,
    load_tokenizer,
    train_tokenizer,
)

ODD_TEXTS = [
    "a\x00b", "\r\n\r\tx", "\u2581 \u2581\u2581x\u2581", "\ufeffé", "  lead", "trail  ", "<s> <|bos|> <0x0A>", "\u2047",
    "\n\n\n", " ", "e\u0301\u2581\u0301", "\ufffd\U0001f600\U0010ffff", "=" * 999, "\u2028\x85", "",
]  # fmt: skip


def test_real_text_and_odd_text_come_back_exactly(tokenizer: Tokenizer, stdlib_texts: list[str]) -> None:
    for text in [*stdlib_texts, *ODD_TEXTS]:
        assert tokenizer.decode(tokenizer.encode(text)) == text


def test_text_never_becomes_a_special_token(tokenizer: Tokenizer) -> None:
    specials = {tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id}
    assert len(specials) == 3
    assert not specials & set(tokenizer.encode("<|bos|> <|eos|> <|pad|> <unk>"))
    assert tokenizer.decode([tokenizer.bos_id, *tokenizer.encode("x"), tokenizer.eos_id, tokenizer.pad_id]) == "x"


def test_newlines_digits_and_indentation_are_tokens_as_promised(tokenizer: Tokenizer) -> None:
    assert len(tokenizer.encode("\n\n")) == 2
    assert len(tokenizer.encode("1234567")) == 7
    assert len(tokenizer.encode(" " * 8)) == 1


def test_token_bytes_add_up_to_the_text(tokenizer: Tokenizer, stdlib_texts: list[str]) -> None:
    assert tokenizer.token_bytes.dtype == np.int32 and tokenizer.token_bytes.shape == (tokenizer.vocab_size,)
    for text in [*stdlib_texts, *ODD_TEXTS]:
        assert tokenizer.token_bytes[tokenizer.encode(text)].sum() == len(text.encode())


def test_training_again_in_another_process_gives_the_same_model(stdlib_texts: list[str], tmp_path: Path) -> None:
    (tmp_path / "text").write_text(stdlib_texts[0])
    here, there = tmp_path / "here.model", tmp_path / "there.model"
    program = (
        "import sys; from pathlib import Path; from dash_train.data.config import TokenizerConfig;"
        "from dash_train.data.tokenizer import train_tokenizer;"
        "text, model = map(Path, sys.argv[1:]);"
        "train_tokenizer([text.read_text()], TokenizerConfig(vocab_size=400, training_sentences=50), model)"
    )
    subprocess.run([sys.executable, "-c", program, tmp_path / "text", there], check=True)
    train_tokenizer([stdlib_texts[0]], TokenizerConfig(vocab_size=400, training_sentences=50), here)
    assert here.read_bytes() == there.read_bytes()


def test_batches_encode_as_single_texts(tokenizer: Tokenizer, stdlib_texts: list[str]) -> None:
    expected = [tokenizer.encode(text) for text in stdlib_texts[:8]]
    assert tokenizer.encode_batch(stdlib_texts[:8], threads=1) == expected
    assert tokenizer.encode_batch(stdlib_texts[:8], threads=2) == expected


def test_save_and_load(tokenizer: Tokenizer, tmp_path: Path) -> None:
    tokenizer.save(tmp_path)
    for path in (tmp_path, tmp_path / "tokenizer.model"):
        assert load_tokenizer(path).hash == tokenizer.hash


def test_huggingface_export_gives_the_same_ids(tokenizer: Tokenizer, stdlib_texts: list[str], tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer.save_huggingface(tmp_path)
    exported = AutoTokenizer.from_pretrained(tmp_path)
    assert (exported.bos_token_id, exported.eos_token_id, exported.pad_token_id) == (1, 2, 3)
    for text in stdlib_texts:
        ids = tokenizer.encode(text)
        assert exported(text, add_special_tokens=False).input_ids == ids
        assert exported(text).input_ids == [tokenizer.bos_id, *ids]
        assert exported.decode(ids) == text


def test_a_huggingface_folder_is_a_tokenizer(tokenizer: Tokenizer, stdlib_texts: list[str], tmp_path: Path) -> None:
    tokenizer.save_huggingface(tmp_path / "first")
    loaded = load_tokenizer(tmp_path / "first")
    assert isinstance(loaded, HuggingFaceTokenizer)
    texts = [*stdlib_texts[:8], *ODD_TEXTS]
    assert loaded.encode_batch(texts, threads=2) == tokenizer.encode_batch(texts, threads=1)
    assert [loaded.decode(loaded.encode(text)) for text in texts] == texts
    assert (loaded.token_bytes == tokenizer.token_bytes).all()
    loaded.save(tmp_path / "second")
    assert load_tokenizer(tmp_path / "second").hash == loaded.hash


def test_a_byte_level_tokenizer_counts_its_bytes(stdlib_texts: list[str], tmp_path: Path) -> None:
    from tokenizers import Tokenizer as FastTokenizer
    from tokenizers import decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    fast = FastTokenizer(models.BPE())
    fast.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    fast.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=["<|end|>"], initial_alphabet=alphabet, show_progress=False
    )
    fast.train_from_iterator(stdlib_texts[:4], trainer)
    PreTrainedTokenizerFast(tokenizer_object=fast, eos_token="<|end|>").save_pretrained(tmp_path)
    loaded = load_tokenizer(tmp_path)
    assert (loaded.bos_id, loaded.pad_id) == (loaded.eos_id, loaded.eos_id) == (0, 0)
    for text in ["naïve — <|end|>\n", stdlib_texts[5]]:
        ids = loaded.encode(text)
        assert loaded.eos_id not in ids
        assert loaded.decode(ids) == text
        assert loaded.token_bytes[ids].sum() == len(text.encode())


def test_a_foreign_sentencepiece_model_exports_with_its_own_rules(stdlib_texts: list[str], tmp_path: Path) -> None:
    """Llama 2's kind: a space is put in front, there is no pad token."""
    import sentencepiece

    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(stdlib_texts[0].split("\n")), model_writer=model, model_type="bpe", vocab_size=400,
        byte_fallback=True, normalization_rule_name="identity", remove_extra_whitespaces=False, minloglevel=2,
    )  # fmt: skip
    foreign = SentencePieceTokenizer(model.getvalue())
    foreign.save_huggingface(tmp_path)
    exported = load_tokenizer(tmp_path)
    assert exported.pad_id == foreign.pad_id == foreign.eos_id
    for text in stdlib_texts[:3]:
        assert exported.encode(text) == foreign.encode(text)
        assert exported.decode(exported.encode(text)) == text


def test_errors_are_one_clear_line(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="missing: no tokenizer here; expected a sentencepiece"):
        load_tokenizer(tmp_path / "missing")
    (tmp_path / "broken.model").write_bytes(b"nothing")
    with pytest.raises(DataError, match=r"broken.model: not a sentencepiece model"):
        load_tokenizer(tmp_path / "broken.model")
    with pytest.raises(DataError, match=r"data.tokenizer.vocab_size: 9999 tokens cannot be learnt"):
        train_tokenizer(["too little text"], TokenizerConfig(vocab_size=9999), tmp_path / "x.model")
    assert not (tmp_path / "x.model").exists()
