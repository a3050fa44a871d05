"""Exports in programs that need packages of their own: transformers 4.57, without dash-train, and llama.cpp.

`make test-clients` makes their environment, `.cache/clients`, and runs these.
"""

import json
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from dash_train.data.chat import with_chat_template
from dash_train.data.config import TokenizerConfig
from dash_train.data.tokenizer import Tokenizer, train_tokenizer
from dash_train.huggingface.conversion import export
from dash_train.inference.generation import generate
from dash_train.model.config import RopeScaling
from dash_train.model.transformer import LanguageModel

pytestmark = pytest.mark.clients
CLIENTS = Path(__file__).parents[2] / ".cache/clients"
TEXTS = [
    "def f(x):\n    return  x",
    "It's 1234 o'clock, <|eos|> é ▁ \U0001f702",
    "  two spaces\tand a tab\r\n",
    "hello",
]
DIVISORS: dict[str, Any] = {
    "short_factor": [1.0 + n / 10 for n in range(8)],
    "long_factor": [1.5 + n for n in range(8)],
}
ROPE = {
    "linear": RopeScaling(type="linear", factor=2, original_seq=64),
    "dynamic": RopeScaling(type="dynamic", factor=2, original_seq=32),
    "yarn": RopeScaling(type="yarn", factor=4, original_seq=32, attention_factor=0.9),
    "llama3": RopeScaling(type="llama3", factor=8, original_seq=32),
    "longrope": RopeScaling(type="longrope", factor=4, original_seq=32, **DIVISORS),
}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "dash": ("dash", {"qk_norm": True}),
    "mixed": ("mixed", {"tie_embeddings": True}),
    "blocks": ("blocks", {"qkv_bias": True, "nope_layers": [1]}),
    "llama": ("full", {}),
    "qwen3": ("full", {"qk_norm": True, "tie_embeddings": True}),
    "qwen2": ("full", {"qkv_bias": True}),
    "smollm3": ("full", {"nope_layers": [0]}),
    "granite": ("full", {"embedding_scale": 3.0, "residual_scale": 0.5, "logits_scale": 0.25}),
    **{f"llama {name}": ("full", {"rope_scaling": scaling}) for name, scaling in ROPE.items()},
    **{f"dash {name}": ("dash", {"rope_scaling": scaling}) for name, scaling in ROPE.items()},
}
COMMON = """
import json, sys
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
expected = torch.load("expected.pt", weights_only=True)
tokenizer = AutoTokenizer.from_pretrained("out")
for text, ids in zip(expected["texts"], expected["ids"]):
    assert tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True) == ids, text
"""
TRANSFORMERS_4 = (
    COMMON
    + """
import transformers
assert transformers.__version__.startswith("4.57")
for folder in ("out", "again"):
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
    model.generation_config.eos_token_id = None
    prompt = expected["tokens"][:, :24]
    with torch.no_grad():
        torch.testing.assert_close(model(expected["tokens"]).logits, expected["logits"], atol=1e-4, rtol=0)
        new = model.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=30, do_sample=False)
    assert torch.equal(new[:, 24:], expected["new"]), (new, expected["new"])
    model.save_pretrained("again")
loss = model(expected["tokens"], labels=expected["tokens"]).loss
loss.backward()
tokenizer.save_pretrained("again")
chat = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}]
assert AutoTokenizer.from_pretrained("again").apply_chat_template(chat, tokenize=False) == expected["chat"]
print(type(model).__name__)
"""
)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    place = tmp_path_factory.mktemp("tokenizer")
    texts = [f"def f{n}(x):\n    return x + {n}  # hello world, it's the number {n}" for n in range(300)]
    trained = train_tokenizer(texts, TokenizerConfig(vocab_size=360), place / "tokenizer.model")
    return with_chat_template(trained, place / "tokenizer")


@pytest.fixture
def make(tiny_model: Callable[..., LanguageModel], tokenizer: Any, tmp_path: Path) -> Callable[[str], LanguageModel]:
    """Exports a model to `out`, with what it gives in `expected.pt`."""

    def make(what: str) -> LanguageModel:
        kind, changes = MODELS[what]
        model = tiny_model(kind, vocab_size=tokenizer.vocab_size, **changes)
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                torch.nn.init.normal_(parameter)
        export(model.state_dict(), model.config, tokenizer, tmp_path / "out", max_seq=128, dtype=torch.float32, card="")
        tokens = torch.randint(4, 300, (2, 70))
        with torch.no_grad():
            logits = model(tokens)["logits"]
        new = torch.tensor(list(generate(model.eval(), tokens[:, :24].tolist(), max_new_tokens=30))).T
        chat = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}]
        said = tokenizer.tokenizer.apply_chat_template(chat, tokenize=False)
        ids = [tokenizer.encode(text) for text in TEXTS]
        expected = {"tokens": tokens, "logits": logits, "new": new, "texts": TEXTS, "ids": ids, "chat": said}
        torch.save(expected, tmp_path / "expected.pt")
        return model

    return make


def run(folder: Path, *command: str | Path) -> str:
    done = subprocess.run([CLIENTS / "bin/python", *command], cwd=folder, text=True, capture_output=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.mark.parametrize("what", MODELS)
def test_transformers_4_opens_an_export(what: str, make: Callable[[str], LanguageModel], tmp_path: Path) -> None:
    make(what)
    name = run(tmp_path, "-c", TRANSFORMERS_4).split()[-1]
    assert name == ("DashForCausalLM" if MODELS[what][0] != "full" else name)


LLAMA_CPP = """
import json, sys
from llama_cpp import Llama
expected = json.load(open("expected.json"))
llama = Llama("out.gguf", n_ctx=128, logits_all=False, verbose=False)
for text, ids in zip(expected["texts"], expected["ids"]):
    found = llama.tokenize(text.encode(), add_bos=False, special=False)
    assert found == ids, (text, found, ids)
llama.reset()
llama.eval(expected["prompt"])
new = []
for _ in expected["new"]:
    new.append(llama.sample(temp=0.0))
    llama.eval(new[-1:])
assert new == expected["new"], (new, expected["new"])
"""


def test_llama_cpp_reads_an_export(make: Callable[[str], LanguageModel], tokenizer: Any, tmp_path: Path) -> None:
    """Four texts become the same tokens, and the same 12 follow a prompt."""
    model = make("llama")
    prompt = [tokenizer.bos_id, *tokenizer.encode("def f(x):\n    return")]
    new = [step[0] for step in generate(model, [prompt], max_new_tokens=12)]
    texts = [text for text in TEXTS if "▁" not in text] + ["for n in range(10):\n\tprint(n)"]
    expected = {"texts": texts, "ids": [tokenizer.encode(text) for text in texts], "prompt": prompt, "new": new}
    (tmp_path / "expected.json").write_text(json.dumps(expected))
    (converter,) = CLIENTS.glob("llama_cpp_python-*/vendor/llama.cpp/convert_hf_to_gguf.py")
    run(tmp_path, converter, "out", "--outfile", "out.gguf", "--outtype", "f32")
    run(tmp_path, "-c", LLAMA_CPP)
