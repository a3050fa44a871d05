"""Tokenizers: sentencepiece models (trained here or given) and Hugging Face folders, behind one interface."""

import hashlib
import io
import json
import logging
import random
import re
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from dash_train.data.config import TokenizerConfig
from dash_train.data.errors import DataError

logger = logging.getLogger(__name__)

BOS, EOS, PAD, UNK = "<|bos|>", "<|eos|>", "<|pad|>", "<unk>"
SPACE = "\u2581"  # how sentencepiece writes a space inside its pieces
SPACE_STAND_IN = "\ufdd0"  # a Unicode noncharacter that stands for a real U+2581 in text
LONGEST_LINE = 4192  # bytes: sentencepiece's trainer leaves longer lines out
LEFT_OUT = re.compile("[\n\u2585]")  # ... and lines with U+2585, which it keeps for itself; "\n" ends a line
# Files that go with a Hugging Face tokenizer: the sentencepiece model that it is, and what its model's authors say of
# generation, such as further tokens that end a text.
COMPANIONS = ("tokenizer.model", "generation_config.json")
PIECE = re.compile(rf".{{1,{LONGEST_LINE // 4}}}(?:(?<! )(?= )|\Z)|.{{1,{LONGEST_LINE // 4}}}", re.DOTALL)


class Tokenizer(Protocol):
    """Text to token ids and back.

    `token_bytes` is int32 `[vocab_size]`: the UTF-8 bytes of text that each token stands for, 0 for special tokens.
    `hash` changes whenever the ids of any text could.
    """

    vocab_size: int
    bos_id: int
    eos_id: int
    pad_id: int
    hash: str
    token_bytes: npt.NDArray[np.int32]

    def encode(self, text: str) -> list[int]:
        """Return the ids of a text, without special tokens: text that spells one is read as plain characters."""
        ...

    def encode_batch(self, texts: Sequence[str], threads: int) -> list[list[int]]:
        """Encode several texts on several threads."""
        ...

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of the ids; special tokens add nothing, broken UTF-8 becomes U+FFFD."""
        ...

    def check_exportable(self) -> None:
        """Raise a `DataError` where `save_huggingface` cannot: known before a model is trained."""
        ...

    def save(self, folder: Path) -> None:
        """Write what `load_tokenizer` needs."""
        ...

    def save_huggingface(self, folder: Path) -> None:
        """Write a folder that `transformers.AutoTokenizer` loads and that gives the same ids."""
        ...


class SentencePieceTokenizer:
    """A sentencepiece model, given as the bytes of its `.model` file."""

    def __init__(self, model: bytes) -> None:
        import sentencepiece

        self.model = model
        self.processor = sentencepiece.SentencePieceProcessor(model_proto=model)
        self.vocab_size: int = self.processor.vocab_size()
        self.eos_id: int = self.processor.eos_id()
        if self.eos_id < 0:
            raise DataError("the sentencepiece model has no end-of-text token, which ends a document; give it one")
        self.bos_id: int = _first_given(self.processor.bos_id(), self.eos_id)
        # Llama 2's model has no pad token: its documents are padded with eos, which no loss counts.
        self.pad_id: int = _first_given(self.processor.pad_id(), self.eos_id)
        self.hash = hashlib.sha256(model).hexdigest()
        self.token_bytes = np.array([self._bytes_of(token) for token in range(self.vocab_size)], dtype=np.int32)

    def _bytes_of(self, token: int) -> int:
        if self.processor.is_control(token) or self.processor.is_unknown(token):
            return 0
        if self.processor.is_byte(token):
            return 1
        return len(self.processor.id_to_piece(token).replace(SPACE, " ").encode("utf-8"))

    def encode(self, text: str) -> list[int]:
        return self.processor.encode(text)

    def encode_batch(self, texts: Sequence[str], threads: int) -> list[list[int]]:
        return self.processor.encode(list(texts), num_threads=threads)

    def decode(self, ids: Sequence[int]) -> str:
        return self.processor.decode(list(ids))

    def check_exportable(self) -> None:
        from dash_train.data.tokenizer_export import check_type

        check_type(self.model)

    def save(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "tokenizer.model").write_bytes(self.model)

    def save_huggingface(self, folder: Path) -> None:
        from dash_train.data.tokenizer_export import about_prefix, save_for_transformers, to_huggingface

        companions = {"tokenizer.model": self.model}
        save_for_transformers(to_huggingface(self.model), folder, companions, **about_prefix(self.model))


class HuggingFaceTokenizer:
    """A Hugging Face tokenizer folder, loaded with `AutoTokenizer`."""

    def __init__(self, folder: Path) -> None:
        from transformers import AutoTokenizer

        try:
            _check_files(folder)
            self.tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)  # else it may ask, and wait
            self.backend = self.tokenizer.backend_tokenizer
        except Exception as error:  # of many kinds: broken JSON, missing files, code of its own
            reason = f"{type(error).__name__}: {' '.join(str(error).split())}"
            raise DataError(
                f"{folder}: transformers cannot load this tokenizer; expected the files that save_pretrained writes "
                f"({reason})"
            ) from error
        _whole_texts(self.backend, folder)
        self.companions = _companions(folder)
        # Ids may have gaps: the vocabulary reaches to the largest, and so does the embedding.
        self.vocab_size: int = max(self.tokenizer.get_vocab().values(), default=-1) + 1
        self.eos_id: int = self.tokenizer.eos_token_id
        if self.eos_id is None:
            raise DataError(f"{folder}: the tokenizer has no eos_token, which ends a document; add it to its config")
        self.bos_id = _first_given(self.tokenizer.bos_token_id, self.eos_id)
        self.pad_id = _first_given(self.tokenizer.pad_token_id, self.eos_id)
        self.hash = hashlib.sha256(
            json.dumps([self.backend.to_str(), self.bos_id, self.eos_id, self.pad_id]).encode("utf-8")
        ).hexdigest()
        self.token_bytes = np.array(self._bytes_of_tokens(), dtype=np.int32)

    def _bytes_of_tokens(self) -> list[int]:
        byte_level = '"ByteLevel"' in json.dumps(json.loads(self.backend.to_str())["decoder"])
        special = set(self.tokenizer.all_special_ids)
        added = self.tokenizer.added_tokens_decoder

        def bytes_of(token: int) -> int:
            piece = self.tokenizer.convert_ids_to_tokens(token)
            if token in special or piece is None:
                return 0
            if token in added:
                return 0 if added[token].special else len(added[token].content.encode("utf-8"))
            if byte_level:
                return len(piece)  # byte-level pieces spell every byte as one character
            if len(piece) == 6 and piece.startswith("<0x"):
                return 1
            return len(piece.replace(SPACE, " ").encode("utf-8"))

        return [bytes_of(token) for token in range(self.vocab_size)]

    def encode(self, text: str) -> list[int]:
        return self.backend.encode(text, add_special_tokens=False).ids

    def encode_batch(self, texts: Sequence[str], threads: int) -> list[list[int]]:
        if threads == 1:
            return [self.encode(text) for text in texts]
        return [row.ids for row in self.backend.encode_batch(list(texts), add_special_tokens=False)]  # all cores

    def decode(self, ids: Sequence[int]) -> str:
        return self.tokenizer.decode(list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False)

    def check_exportable(self) -> None:
        pass

    def save(self, folder: Path) -> None:
        from dash_train.data.tokenizer_export import save_for_transformers

        save_for_transformers(self.tokenizer, folder, self.companions)

    def save_huggingface(self, folder: Path) -> None:
        self.save(folder)


def _check_files(folder: Path) -> None:
    """A tokenizer that is its tokenizer.json has one: transformers would make something else of a tokenizer.model."""
    config = folder / "tokenizer_config.json"
    kind = json.loads(config.read_bytes()).get("tokenizer_class") if config.is_file() else None
    if kind in ("PreTrainedTokenizerFast", "TokenizersBackend") and not (folder / "tokenizer.json").is_file():
        raise FileNotFoundError("tokenizer.json is missing")


def _companions(folder: Path) -> dict[str, bytes]:
    found = {name: file.read_bytes() for name in COMPANIONS if (file := folder / name).is_file()}
    config = folder / "config.json"
    if "generation_config.json" not in found and config.is_file():
        eos = json.loads(config.read_bytes()).get("eos_token_id")
        if isinstance(eos, list):
            found["generation_config.json"] = json.dumps({"eos_token_id": eos}).encode()
    return found


def load_tokenizer(path: str | Path) -> Tokenizer:
    """Load a sentencepiece `.model` file, a folder that `Tokenizer.save` wrote, or a Hugging Face tokenizer folder."""
    path = Path(path).expanduser()
    if (path / "tokenizer.json").is_file() or (path / "tokenizer_config.json").is_file():
        return HuggingFaceTokenizer(path)
    model = path / "tokenizer.model" if path.is_dir() else path
    if not model.is_file():
        raise DataError(f"{path}: no tokenizer here; expected a sentencepiece .model file or a Hugging Face folder")
    proto = model.read_bytes()
    try:
        if proto:  # sentencepiece takes nothing at all for a model, until it is used
            return SentencePieceTokenizer(proto)
    except DataError as error:
        raise DataError(f"{model}: {error}") from None
    except RuntimeError as error:
        raise DataError(f"{model}: not a sentencepiece model") from error
    raise DataError(f"{model}: not a sentencepiece model but an empty file")


def _whole_texts(backend: Any, folder: Path) -> None:
    """Turn off what a `tokenizer.json` may carry: documents would be cut, padded or left to chance."""
    saved = {"truncation": backend.truncation, "padding": backend.padding, "dropout": _dropout(backend)}
    if found := [name for name, value in saved.items() if value]:
        logger.warning("%s: tokenizer.json asks for %s; left out, texts are read whole", folder, " and ".join(found))
    backend.no_truncation()
    backend.no_padding()
    if saved["dropout"]:
        backend.model.dropout = None
    backend.encode_special_tokens = True  # text that spells a special token is text


def _dropout(backend: Any) -> float | None:
    return getattr(backend.model, "dropout", None)


LOSSES = {
    "line ends": "a\nb",
    "carriage returns": "a\r\nb",
    "tabs": "a\tb",
    "runs of spaces": "a\n    b",
    "capital letters": "aB",
    "accents": "a\u00e9",
    "compatibility characters": "a\ufb01\uff21",
    "rare characters": "a\U0001f702",
}


def lost_by(tokenizer: Tokenizer) -> list[str]:
    """Name what does not come back as it was when a text is encoded and decoded: normalisation, or no bytes for it."""
    return [name for name, text in LOSSES.items() if tokenizer.decode(tokenizer.encode(text)) != text]


def train_tokenizer(texts: Iterable[str], config: TokenizerConfig, path: Path) -> Tokenizer:
    r"""Train a sentencepiece BPE on the texts and write its model to `path`; the same texts give the same model.

    Byte fallback, digits apart, a newline a token of its own, runs of spaces kept, nothing normalised: every valid
    text comes back as it was, `\r` and NUL included. Two characters change places to make that so: sentencepiece
    writes spaces as U+2581, so a real U+2581 is stored as the noncharacter U+FDD0, and a real U+FDD0 (which Unicode
    keeps out of text) would come back as U+2581.
    """
    import sentencepiece
    from sentencepiece import sentencepiece_model_pb2

    sentencepiece.set_min_log_level(2)
    lines = _sample(_training_lines(texts), config.training_sentences)
    model = io.BytesIO()
    with tempfile.TemporaryDirectory() as folder:
        to_piece, to_text = Path(folder, "normalize.tsv"), Path(folder, "denormalize.tsv")
        to_piece.write_text(f"{ord(SPACE):X}\t{ord(SPACE_STAND_IN):X}\n")
        to_text.write_text(f"{ord(SPACE_STAND_IN):X}\t{ord(SPACE):X}\n")
        options: dict[str, Any] = {
            "model_type": "bpe",
            "vocab_size": config.vocab_size,
            "byte_fallback": True,
            "split_digits": True,
            "allow_whitespace_only_pieces": True,
            "user_defined_symbols": ["\n"],
            "normalization_rule_tsv": str(to_piece),
            "denormalization_rule_tsv": str(to_text),
            "add_dummy_prefix": False,
            "remove_extra_whitespaces": False,
            "num_threads": 4,
            "unk_id": 0,
            "bos_id": 1,
            "eos_id": 2,
            "pad_id": 3,
            "unk_piece": UNK,
            "bos_piece": BOS,
            "eos_piece": EOS,
            "pad_piece": PAD,
        }
        # Where a few characters are nearly all of the text, the others count too: else too little is left to learn.
        for last_try in (False, True):
            coverage: dict[str, Any] = {"character_coverage": 1.0} if last_try else {}
            try:
                sentencepiece.SentencePieceTrainer.train(
                    sentence_iterator=iter(lines), model_writer=model, **options, **coverage
                )
                break
            except RuntimeError as error:
                if last_try:
                    raise DataError(
                        f"data.tokenizer.vocab_size: {config.vocab_size} tokens cannot be learnt from this text; "
                        f"give more text or a smaller vocabulary ({str(error).split('] ')[-1]})"
                    ) from error
    proto = sentencepiece_model_pb2.ModelProto.FromString(model.getvalue())
    for spec in (proto.normalizer_spec, proto.denormalizer_spec):
        spec.ClearField("normalization_rule_tsv")  # the path of a temporary file: it would change the hash
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(proto.SerializeToString())
    return SentencePieceTokenizer(path.read_bytes())


def _training_lines(texts: Iterable[str]) -> Iterator[str]:
    """Cut texts into lines that sentencepiece learns from, for those that it would leave out it leaves out unsaid.

    What it learns from are words that begin with their spaces, so a cut before a space changes nothing.
    """
    for text in texts:
        for line in LEFT_OUT.split(text):
            if len(line) <= LONGEST_LINE // 4 or len(line.encode("utf-8")) <= LONGEST_LINE:
                if line:
                    yield line
            else:
                yield from PIECE.findall(line)


def _sample(lines: Iterable[str], size: int) -> list[str]:
    """Draw `size` lines, the same ones at every call: sentencepiece's own sampling cannot be seeded."""
    generator = random.Random(0)
    sample: list[str] = []
    for number, line in enumerate(lines):
        if number < size:
            sample.append(line)
        elif (place := int(generator.random() * (number + 1))) < size:
            sample[place] = line
    return sample


def _first_given(token: int | None, otherwise: int) -> int:
    """Return a token id, or the other one where there is none: None in transformers, -1 in sentencepiece."""
    return otherwise if token is None or token < 0 else token
