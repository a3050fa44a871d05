"""Tokenizers: sentencepiece models (trained here or given) and Hugging Face folders, behind one interface."""

import hashlib
import io
import json
import random
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from dash_train.data.config import TokenizerConfig
from dash_train.data.errors import DataError

BOS, EOS, PAD, UNK = "<|bos|>", "<|eos|>", "<|pad|>", "<unk>"
SPACE = "\u2581"  # how sentencepiece writes a space inside its pieces
SPACE_STAND_IN = "\ufdd0"  # a Unicode noncharacter that stands for a real U+2581 in text


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
        self.bos_id: int = self.processor.bos_id()
        self.eos_id: int = self.processor.eos_id()
        # Llama 2's model has no pad token: its documents are padded with eos, which no loss counts.
        self.pad_id: int = self.processor.pad_id() if self.processor.pad_id() >= 0 else self.eos_id
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

    def save(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "tokenizer.model").write_bytes(self.model)

    def save_huggingface(self, folder: Path) -> None:
        from dash_train.data.tokenizer_export import to_huggingface

        to_huggingface(self.model).save_pretrained(folder)


class HuggingFaceTokenizer:
    """A Hugging Face tokenizer folder, loaded with `AutoTokenizer`."""

    def __init__(self, folder: Path) -> None:
        from transformers import AutoTokenizer

        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        self.backend = self.tokenizer.backend_tokenizer
        self.backend.encode_special_tokens = True  # text that spells a special token is text
        self.vocab_size: int = len(self.tokenizer)
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

    def save(self, folder: Path) -> None:
        self.tokenizer.save_pretrained(folder)

    def save_huggingface(self, folder: Path) -> None:
        self.save(folder)


def load_tokenizer(path: str | Path) -> Tokenizer:
    """Load a sentencepiece `.model` file, a folder that `Tokenizer.save` wrote, or a Hugging Face tokenizer folder."""
    path = Path(path).expanduser()
    if (path / "tokenizer.json").is_file() or (path / "tokenizer_config.json").is_file():
        return HuggingFaceTokenizer(path)
    model = path / "tokenizer.model" if path.is_dir() else path
    if not model.is_file():
        raise DataError(f"{path}: no tokenizer here; expected a sentencepiece .model file or a Hugging Face folder")
    try:
        return SentencePieceTokenizer(model.read_bytes())
    except RuntimeError as error:
        raise DataError(f"{model}: not a sentencepiece model") from error


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
    lines = _sample((line for text in texts for line in text.split("\n") if line), config.training_sentences)
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
        try:
            sentencepiece.SentencePieceTrainer.train(sentence_iterator=iter(lines), model_writer=model, **options)
        except RuntimeError as error:
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
    return otherwise if token is None else token
