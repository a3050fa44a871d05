import io
import json
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dash_train.data.config import TokenizerConfig
from dash_train.data.errors import DataError
from dash_train.data.tokenizer import (
    HuggingFaceTokenizer,
    SentencePieceTokenizer,
    Tokenizer,
    load_tokenizer,
    lost_by,
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


def learnt(texts: list[str], path: Path, vocab_size: int = 400) -> str:
    """The hash of the tokenizer that is trained on the texts."""
    return train_tokenizer(texts, TokenizerConfig(vocab_size=vocab_size), path / "trained.model").hash


def test_long_lines_teach_what_short_ones_do(tmp_path: Path) -> None:
    generator = random.Random(0)
    words = ["".join(generator.choices("abcdefghijéß", k=generator.randint(1, 8))) for _ in range(300)]
    words = [" " * generator.choice([1, 1, 1, 4]) + generator.choice(words) for _ in range(30_000)]
    broken = ["".join(words[place : place + 12]) for place in range(0, len(words), 12)]
    assert len("".join(words).encode()) > 100_000
    expected = learnt(["\n".join(broken)], tmp_path)
    assert learnt(["".join(words)], tmp_path) == expected
    assert learnt(["".join(broken[:1200]), "\n".join(broken[1200:])], tmp_path) == expected


def test_long_lines_without_a_space_are_learnt(tmp_path: Path) -> None:
    generator = random.Random(0)
    words = ["".join(generator.choices("天地玄黃宇宙洪荒日月盈昃", k=3)) for _ in range(30)]
    line = "".join(generator.choices(words, k=5000))
    trained = train_tokenizer([line], TokenizerConfig(vocab_size=300), tmp_path / "x.model")
    assert len(trained.encode(line)) < 0.65 * len(line)


def test_lines_with_the_trainers_own_character_are_learnt(tmp_path: Path) -> None:
    bars = "\u2585"
    lines = [f"progress report number {number} of the nightly build" for number in range(60)]
    assert learnt([f"{bars}\n".join(lines)], tmp_path, 300) == learnt(["\n".join(lines)], tmp_path, 300)


def test_a_text_of_nearly_one_character_leaves_the_others_to_learn(tmp_path: Path) -> None:
    words = " ".join(f"alpha{number % 17} beta document {number}" for number in range(60))
    trained = train_tokenizer(["=" * 1_000_000, words], TokenizerConfig(vocab_size=310), tmp_path / "x.model")
    assert trained.decode(trained.encode(words)) == words and len(trained.encode(words)) < len(words)


def sentencepiece_model(text: str, **options: Any) -> bytes:
    """A small foreign model, Llama's kind unless the options say otherwise."""
    import sentencepiece

    model = io.BytesIO()
    settings: dict[str, Any] = {
        "model_type": "bpe",
        "vocab_size": 400,
        "byte_fallback": True,
        "hard_vocab_limit": False,
    }
    lines = iter([line for line in text.split("\n") if line])
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=lines, model_writer=model, minloglevel=2, **{**settings, **options}
    )
    return model.getvalue()


def test_end_of_text_stands_in_for_a_missing_beginning_also_in_the_export(
    stdlib_texts: list[str], tmp_path: Path
) -> None:
    from transformers import AutoTokenizer

    path = tmp_path / "t.model"
    path.write_bytes(sentencepiece_model(stdlib_texts[0], pad_id=0, eos_id=1, unk_id=2, bos_id=-1))
    loaded = load_tokenizer(path)
    assert (loaded.bos_id, loaded.eos_id, loaded.pad_id) == (1, 1, 0)
    loaded.save_huggingface(tmp_path / "exported")
    exported = AutoTokenizer.from_pretrained(tmp_path / "exported")
    assert exported("x").input_ids == [1, *loaded.encode("x")]
    assert (exported.bos_token_id, exported.eos_token_id, exported.pad_token_id) == (1, 1, 0)


def test_sentencepiece_models_that_cannot_be_used_are_one_clear_line(stdlib_texts: list[str], tmp_path: Path) -> None:
    path = tmp_path / "t.model"
    path.write_bytes(sentencepiece_model(stdlib_texts[0], eos_id=-1))
    with pytest.raises(DataError, match=r"t.model: the sentencepiece model has no end-of-text token"):
        load_tokenizer(path)
    path.write_bytes(b"")
    with pytest.raises(DataError, match=r"t.model: not a sentencepiece model but an empty file"):
        load_tokenizer(path)
    path.write_bytes(sentencepiece_model(stdlib_texts[0], model_type="unigram"))
    with pytest.raises(DataError, match="a sentencepiece unigram model, with which no trained model could be exported"):
        load_tokenizer(path).check_exportable()


def test_what_a_tokenizer_loses_is_named(tokenizer: Tokenizer, stdlib_texts: list[str]) -> None:
    assert lost_by(tokenizer) == []
    lossy = SentencePieceTokenizer(sentencepiece_model(stdlib_texts[0]))
    assert lost_by(lossy) == ["line ends", "carriage returns", "tabs", "runs of spaces", "compatibility characters"]
    bytes_missing = SentencePieceTokenizer(
        sentencepiece_model(stdlib_texts[0], byte_fallback=False, vocab_size=200, normalization_rule_name="nmt_nfkc_cf")
    )
    assert {"capital letters", "rare characters"} <= set(lost_by(bytes_missing))


@pytest.fixture
def huggingface(tokenizer: Tokenizer, tmp_path: Path) -> Path:
    """A Hugging Face folder of the tokenizer trained here."""
    tokenizer.save_huggingface(tmp_path / "tok")
    return tmp_path / "tok"


def change(folder: Path, **values: Any) -> None:
    """Change the top level of `tokenizer.json`; `model` is merged."""
    path = folder / "tokenizer.json"
    saved = json.loads(path.read_text())
    values["model"] = {**saved["model"], **values.get("model", {})}
    path.write_text(json.dumps({**saved, **values}))


TRUNCATION = {"direction": "Right", "max_length": 8, "strategy": "LongestFirst", "stride": 0}
PADDING = {
    "strategy": {"Fixed": 64}, "direction": "Right", "pad_to_multiple_of": None, "pad_id": 3, "pad_type_id": 0,
    "pad_token": "<|pad|>",
}  # fmt: skip


@pytest.mark.parametrize("saved", [{"truncation": TRUNCATION}, {"padding": PADDING}, {"model": {"dropout": 0.5}}])
def test_what_a_tokenizer_json_does_to_texts_is_left_out_and_said(
    huggingface: Path, tokenizer: Tokenizer, saved: dict[str, Any], caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    right = load_tokenizer(huggingface)
    assert not caplog.messages
    change(huggingface, **saved)
    loaded = load_tokenizer(huggingface)
    name = "dropout" if "model" in saved else next(iter(saved))
    assert caplog.messages == [f"{huggingface}: tokenizer.json asks for {name}; left out, texts are read whole"]
    texts = ["short", "a text of more than eight tokens, which stays whole " * 9]
    expected = [tokenizer.encode(text) for text in texts]
    for threads in (1, 2):
        assert loaded.encode_batch(texts, threads) == expected
    assert loaded.hash == right.hash
    loaded.save_huggingface(tmp_path / "again")
    assert json.loads((tmp_path / "again" / "tokenizer.json").read_text()).get(name) is None


def test_ids_with_gaps_reach_to_the_largest(huggingface: Path, tokenizer: Tokenizer) -> None:
    vocab = json.loads((huggingface / "tokenizer.json").read_text())["model"]["vocab"]
    last = max(vocab, key=vocab.__getitem__)
    vocab[last] += 100
    change(huggingface, model={"vocab": vocab})
    loaded = load_tokenizer(huggingface)
    assert loaded.vocab_size == len(loaded.token_bytes) == tokenizer.vocab_size + 100
    assert loaded.token_bytes[tokenizer.vocab_size - 1 : -1].sum() == 0
    assert loaded.token_bytes[-1] == tokenizer.token_bytes[-1]


BROKEN = {
    "tokenizer.json": ["", "{}", '{"version": "1.0", "trunc', "[]", None],
    "tokenizer_config.json": [
        "",
        "[]",
        "{",
        '{"tokenizer_class": "Evil", "auto_map": {"AutoTokenizer": ["e.E", null]}}',
    ],
}


@pytest.mark.parametrize(("name", "contents"), [(name, text) for name in BROKEN for text in BROKEN[name]])
def test_broken_huggingface_folders_are_one_clear_line(huggingface: Path, name: str, contents: str | None) -> None:
    path = huggingface / name
    path.unlink() if contents is None else path.write_text(contents)
    with pytest.raises(DataError, match=f"^{huggingface}: ") as error:
        load_tokenizer(huggingface)
    assert "\n" not in str(error.value)
