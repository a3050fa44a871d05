"""A sentencepiece BPE model as a Hugging Face fast tokenizer with the same ids."""

import json
from pathlib import Path
from typing import Any

from dash_train.data.errors import DataError
from dash_train.data.tokenizer import SPACE, SPACE_STAND_IN, SentencePieceTokenizer


def to_huggingface(model: bytes) -> Any:
    """Return a `PreTrainedTokenizerFast` that gives the ids of a sentencepiece BPE, the bytes of a `.model` file.

    A call with special tokens puts BOS in front, as documents have it in training; with `add_special_tokens=False` it
    gives exactly `Tokenizer.encode`. One difference: Hugging Face reads text that spells a special token, such as
    `<|bos|>`, as that token, unless it is loaded with `split_special_tokens=True`.
    """
    from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, processors
    from transformers import PreTrainedTokenizerFast

    proto = check_type(model)
    pieces = [piece.piece for piece in proto.pieces]
    unknown = pieces[proto.trainer_spec.unk_id]
    trained = SentencePieceTokenizer(model)
    bos, eos, pad = (pieces[token] for token in (trained.bos_id, trained.eos_id, trained.pad_id))

    tokenizer = Tokenizer(
        models.BPE(
            vocab={piece: token for token, piece in enumerate(pieces)},
            merges=_merges(proto),
            unk_token=unknown,
            fuse_unk=True,
            byte_fallback=proto.trainer_spec.byte_fallback,
        )
    )
    tokenizer.normalizer = normalizers.Sequence(_normalizers(proto))
    tokenizer.decoder = decoders.Sequence(_decoders(proto))
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{bos} $A", pair=f"{bos} $A {bos} $B", special_tokens=[(bos, pieces.index(bos))]
    )
    user_defined = [piece.piece for piece in proto.pieces if piece.type == piece.USER_DEFINED]
    # A single character needs no matching in the text: no merge takes it in.
    tokenizer.add_tokens([AddedToken(piece, normalized=True) for piece in user_defined if len(piece) > 1])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=bos, eos_token=eos, pad_token=pad, unk_token=unknown
    )


def save_for_transformers(tokenizer: Any, folder: Path, companions: dict[str, bytes], **added: Any) -> None:
    """Write a Hugging Face tokenizer so that transformers 4 and 5 read it, and beside it other files: the sentencepiece
    model that it is, for programs (llama.cpp) that read those. `added` goes into tokenizer_config.json."""
    tokenizer.save_pretrained(folder)
    path = folder / "tokenizer_config.json"
    values = json.loads(path.read_text())
    if values.get("tokenizer_class") == "TokenizersBackend":
        values["tokenizer_class"] = "PreTrainedTokenizerFast"  # the name that transformers 4 knows, too
    if isinstance(more := values.pop("extra_special_tokens", None), list) and more:
        values["additional_special_tokens"] = more  # likewise
    for name, content in companions.items():
        (folder / name).write_bytes(content)
    about_loading = ("is_local", "local_files_only")  # which is no part of a tokenizer
    values = {name: value for name, value in {**values, **added}.items() if name not in about_loading}
    path.write_text(json.dumps(values, indent=2, ensure_ascii=False, sort_keys=True) + "\n")


def about_prefix(model: bytes) -> dict[str, bool]:
    """What tokenizer_config.json says of a space in front of a text, by which llama.cpp tokenizes."""
    return {"add_prefix_space": check_type(model).normalizer_spec.add_dummy_prefix}


def check_type(model: bytes) -> Any:
    """Return the parsed model. One that is not a BPE cannot be exported, which is a `DataError`."""
    from sentencepiece import sentencepiece_model_pb2

    proto = sentencepiece_model_pb2.ModelProto.FromString(model)
    if proto.trainer_spec.model_type != proto.trainer_spec.BPE:
        kind = proto.trainer_spec.ModelType.Name(proto.trainer_spec.model_type).lower()
        raise DataError(
            f"data.tokenizer.path: a sentencepiece {kind} model, with which no trained model could be exported; "
            "expected a BPE model, or the tokenizer as a Hugging Face folder (tokenizer.json)"
        )
    return proto


def _merges(proto: Any) -> list[tuple[str, str]]:
    """List every pair of pieces that makes a piece, best score first.

    Sentencepiece merges by the score of the result and keeps no pairs. Pairs with one result tie there, and the
    leftmost in the text goes first; here the pair with the longer left piece does, which comes to the same.
    """
    scores = {piece.piece: piece.score for piece in proto.pieces if piece.type == piece.NORMAL}
    pairs = [
        (-score, -cut, piece[:cut], piece[cut:])
        for piece, score in scores.items()
        for cut in range(1, len(piece))
        if piece[:cut] in scores and piece[cut:] in scores
    ]
    return [(left, right) for _, _, left, right in sorted(pairs)]


def _trained_here(proto: Any) -> bool:
    return bool(proto.denormalizer_spec.precompiled_charsmap)


def _normalizers(proto: Any) -> list[Any]:
    from tokenizers import Regex, normalizers

    spec = proto.normalizer_spec
    steps: list[Any] = []
    if _trained_here(proto):
        steps.append(normalizers.Replace(SPACE, SPACE_STAND_IN))
    elif spec.precompiled_charsmap:
        steps.append(normalizers.Precompiled(spec.precompiled_charsmap))
    if spec.remove_extra_whitespaces:
        steps += [normalizers.Strip(), normalizers.Replace(Regex(" {2,}"), " ")]
    if spec.add_dummy_prefix:
        steps.append(normalizers.Prepend(SPACE))
    return [*steps, normalizers.Replace(" ", SPACE)]


def _decoders(proto: Any) -> list[Any]:
    from tokenizers import decoders

    steps = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    if _trained_here(proto):
        steps.append(decoders.Replace(SPACE_STAND_IN, SPACE))
    if proto.normalizer_spec.add_dummy_prefix:
        steps.append(decoders.Strip(" ", 1, 0))
    return steps
