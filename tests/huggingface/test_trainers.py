"""Programs that people train and evaluate models with, on an exported Dash model: Trainer, peft, trl, lm-eval."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

from dash_train.data.chat import with_chat_template
from dash_train.data.config import TokenizerConfig
from dash_train.data.tokenizer import HuggingFaceTokenizer, train_tokenizer
from dash_train.huggingface.conversion import export
from dash_train.huggingface.generated import modeling_code
from dash_train.model.config import ModelConfig
from dash_train.model.transformer import LanguageModel

pytest.importorskip("trl", reason="the clients are in the extra `dev`")
SHAPE: dict[str, Any] = {"layers": 2, "hidden_size": 32, "heads": 4, "kv_heads": 2, "head_dim": 16, "mlp_size": 48}
ROUTING = {"chunk_size": 16, "type": ["dash", "full"], "routing_scale": 8.0, "routing_block": [4, 1]}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An export with a tokenizer that has a chat template."""
    place = tmp_path_factory.mktemp("clients")
    texts = [f"user and assistant say hello number {n}\nWhat is {n}? It is {n}." for n in range(300)]
    trained = train_tokenizer(texts, TokenizerConfig(vocab_size=340), place / "tokenizer.model")
    tokenizer = with_chat_template(trained, place / "tokenizer")
    assert isinstance(tokenizer, HuggingFaceTokenizer)
    config = ModelConfig(**SHAPE, vocab_size=tokenizer.vocab_size, attention=ROUTING, init_std=0.1)
    torch.manual_seed(0)
    weights = LanguageModel(config).state_dict()
    export(weights, config, tokenizer, place / "out", max_seq=256, dtype=torch.float32, card="# A model")
    return place / "out"


@pytest.fixture
def model(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder)


@pytest.fixture(scope="module")
def tokenizer(folder: Path) -> Any:
    return AutoTokenizer.from_pretrained(folder)


def train_steps(model: Any, rows: Dataset, out: Path, **options: Any) -> list[dict[str, float]]:
    """The logged steps of transformers' Trainer."""
    usual = {"max_steps": 3, "learning_rate": 1e-2, "logging_steps": 1, "report_to": [], "use_cpu": True}
    arguments = TrainingArguments(str(out), lr_scheduler_type="constant", save_strategy="no", **{**usual, **options})
    trainer = Trainer(model, arguments, train_dataset=rows)
    trainer.train()
    return [line for line in trainer.state.log_history if "grad_norm" in line]


def test_accumulation_changes_no_step(folder: Path, tmp_path: Path) -> None:
    """Batches of 8 x 1 and 2 x 4, as transformers' own Llama has it."""
    torch.manual_seed(0)
    labels = torch.randint(4, 300, (24, 40))
    rows = Dataset.from_list(
        [
            {"input_ids": row.tolist(), "labels": [-100] * (3 * n % 17) + row.tolist()[3 * n % 17 :]}
            for n, row in enumerate(labels)
        ]
    )

    def llama() -> Any:
        torch.manual_seed(0)
        return LlamaForCausalLM(
            LlamaConfig(
                vocab_size=342, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4
            )
        )

    for make in (lambda: AutoModelForCausalLM.from_pretrained(folder), llama):
        whole, parts = (
            train_steps(make(), rows, tmp_path, per_device_train_batch_size=size, gradient_accumulation_steps=8 // size)
            for size in (8, 2)
        )
        for one, other in zip(whole, parts, strict=True):
            assert one["loss"] == pytest.approx(other["loss"], rel=1e-4)
            assert one["grad_norm"] == pytest.approx(other["grad_norm"], rel=1e-4)


def test_a_trainers_checkpoint_opens_anywhere(model: Any, tmp_path: Path) -> None:
    rows = Dataset.from_list([{"input_ids": list(range(40)), "labels": list(range(40))}] * 8)
    options = {"save_strategy": "steps", "save_steps": 2, "max_steps": 2, "gradient_checkpointing": True}
    arguments = TrainingArguments(str(tmp_path), use_cpu=True, report_to=[], **options)
    trainer = Trainer(model, arguments, train_dataset=rows)
    trainer.train()
    saved = tmp_path / "checkpoint-2"
    assert (saved / "modeling_dash_train.py").read_text() == modeling_code()
    tokens = torch.arange(40)[None]
    with torch.no_grad():
        expected = model.eval()(tokens).logits
        torch.testing.assert_close(AutoModelForCausalLM.from_pretrained(saved)(tokens).logits, expected)
    assert opened_without_the_package(saved, expected) < 1e-4


def opened_without_the_package(folder: Path, expected: torch.Tensor) -> float:
    """The largest difference of logits that a Python without dash-train computes of tokens 0 to 39."""
    code = (
        "import sys; sys.modules['dash_train'] = None\n"
        "import torch; from transformers import AutoModelForCausalLM\n"
        f"model = AutoModelForCausalLM.from_pretrained({str(folder)!r}, trust_remote_code=True)\n"
        "torch.save(model(torch.arange(40)[None]).logits.detach(), sys.argv[1])"
    )
    out = folder.parent / "logits.pt"
    subprocess.run([sys.executable, "-c", code, str(out)], check=True, capture_output=True)
    return (torch.load(out) - expected).abs().max().item()


def test_lora_is_trained_saved_merged_and_loaded(folder: Path, model: Any, tmp_path: Path) -> None:
    from peft import LoraConfig, PeftModel, get_peft_model

    lora = get_peft_model(
        model, LoraConfig(r=4, target_modules=["q_proj", "v_proj", "down_proj"], task_type="CAUSAL_LM")
    )
    rows = Dataset.from_list(
        [{"input_ids": list(range(n, n + 40)), "labels": list(range(n, n + 40))} for n in range(12)]
    )
    losses = [line["loss"] for line in train_steps(lora, rows, tmp_path / "run", max_steps=8)]
    assert losses[-1] < losses[0]
    lora.save_pretrained(tmp_path / "adapter")
    tokens = torch.arange(40)[None]
    with torch.no_grad():
        expected = lora.eval()(tokens).logits
        again = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(folder), tmp_path / "adapter")
        torch.testing.assert_close(again(tokens).logits, expected)
        lora.merge_and_unload().save_pretrained(tmp_path / "merged")
        merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
        torch.testing.assert_close(merged(tokens).logits, expected, atol=1e-5, rtol=1e-4)
    assert opened_without_the_package(tmp_path / "merged", expected) < 1e-4


@pytest.mark.parametrize("packing", [False, True])
def test_trl_fine_tunes_on_chats(packing: bool, model: Any, tokenizer: Any, tmp_path: Path) -> None:
    from trl import SFTConfig, SFTTrainer

    chats = [
        {"messages": [{"role": "user", "content": f"What is {n}?"}, {"role": "assistant", "content": f"It is {n}."}]}
        for n in range(24)
    ]
    arguments = SFTConfig(
        str(tmp_path), max_steps=3, packing=packing, max_length=128, use_cpu=True, bf16=False, report_to=[],
        logging_steps=1, learning_rate=1e-2, per_device_train_batch_size=4, save_strategy="no",
    )  # fmt: skip
    trainer = SFTTrainer(model, arguments, train_dataset=Dataset.from_list(chats), processing_class=tokenizer)
    trainer.train()
    losses = [line["loss"] for line in trainer.state.log_history if "loss" in line]
    assert len(losses) == 3
    assert losses[-1] < losses[0]


def test_trl_learns_preferences(model: Any, tokenizer: Any, tmp_path: Path) -> None:
    from trl import DPOConfig, DPOTrainer

    rows = [{"prompt": f"What is {n}?", "chosen": f" It is {n}.", "rejected": " hello"} for n in range(12)]
    arguments = DPOConfig(
        str(tmp_path), max_steps=3, use_cpu=True, bf16=False, report_to=[], logging_steps=1, learning_rate=1e-2,
        per_device_train_batch_size=4, save_strategy="no",
    )  # fmt: skip
    trainer = DPOTrainer(model, args=arguments, train_dataset=Dataset.from_list(rows), processing_class=tokenizer)
    trainer.train()
    losses = [line["loss"] for line in trainer.state.log_history if "loss" in line]
    assert len(losses) == 3
    assert losses[-1] < losses[0]


def test_tokens_are_added(folder: Path, model: Any, tokenizer: Any, tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens(["<tool>", "</tool>"], special_tokens=True)
    model.resize_token_embeddings(len(tokenizer))
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert again.config.vocab_size == again.get_input_embeddings().num_embeddings == len(tokenizer)
    ids = AutoTokenizer.from_pretrained(tmp_path)("<tool>x</tool>", return_tensors="pt").input_ids
    assert int(ids.max()) == len(tokenizer) - 1
    assert again(ids).logits.shape[-1] == len(tokenizer)


TASK = """
task: tiny
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: {kind}
doc_to_text: "{{{{text}}}}"
doc_to_target: "{{{{target}}}}"
{more}
metric_list: [{{metric: {metric}, aggregation: mean, higher_is_better: true}}]
"""


@pytest.mark.parametrize("kind", ["multiple_choice", "generate_until"])
def test_lm_eval_gives_the_same_in_batches(kind: str, folder: Path, tmp_path: Path) -> None:
    lm_eval = pytest.importorskip("lm_eval")
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    data, task = tmp_path / "data.jsonl", tmp_path / "tiny.yaml"
    rows = [
        {"text": "What is " * (n % 5 + 1) + f"{n}?", "target": n % 2, "choices": [" It is", " hello"]} for n in range(8)
    ]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    more = {
        "multiple_choice": 'doc_to_choice: "{{choices}}"',
        "generate_until": 'generation_kwargs: {until: ["\\n"], max_gen_toks: 8, do_sample: false}',
    }
    metric = {"multiple_choice": "acc", "generate_until": "exact_match"}
    task.write_text(TASK.format(data=data, kind=kind, more=more[kind], metric=metric[kind]))
    found = []
    for batch in (1, 4):
        model = HFLM(pretrained=str(folder), batch_size=batch, device="cpu", dtype="float32", trust_remote_code=True)
        manager = TaskManager(include_path=str(tmp_path), include_defaults=False)
        results = lm_eval.simple_evaluate(
            model, tasks=["tiny"], task_manager=manager, log_samples=True, bootstrap_iters=0
        )
        found.append([reply for sample in results["samples"]["tiny"] for reply in sample["resps"]])
    if kind == "generate_until":
        assert found[0] == found[1]
        return
    one, four = (torch.tensor([float(reply[0][0]) for reply in replies]) for replies in found)
    assert len(one) == 16
    torch.testing.assert_close(one, four)
