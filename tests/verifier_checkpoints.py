"""Tiny random checkpoints in the published formats of verifiers, each with a reference of how to score with it.

Tokenizers are trained here on a few sentences; weights are saved under their published names. A reference is written
as the format's model card uses its model: one candidate at a time, whole vocabularies and all.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from torch import nn

from configs.schema import PretrainedVerifier
from search.types import Problem, ScoreRequest
from search.verifiers.pretrained import Pretrained, load_pretrained

DELIMITER = "\n\n"
ANSWERS = [
    ("What is 12 + 30 - 4?", "First, 12 + 30 = 42.\n\nThen 42 - 4 = 38.\n\nThe answer is 38."),
    ("What is 12 + 30 - 4?", "12 + 30 = 41, so\nthe rest is 37."),
    ("What is 12 + 30 - 4?", "First, 12 + 30 = 42.\n\n"),
    (
        "A duck lays 16 eggs a day. How many in three weeks?",
        "Three weeks are 21 days.\n\n16 \u00d7 21 = 336.\n\nDone: 336",
    ),
    ("Why?", "Because.\n\n- so it is +\n\n  indented \n\n(end)"),
]
CORPUS = [text for pair in ANSWERS for text in pair] * 3 + ["system user assistant answer step label"] * 5
CONFIG: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 1024,
    "initializer_range": 0.3,  # scores far apart
    "tie_word_embeddings": False,
}
CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
LLAMA3 = (
    "{{ bos_token }}{% if messages[0]['role'] != 'system' %}<|start_header_id|>system<|end_header_id|>\n\n"
    "Today is a day.<|eot_id|>{% endif %}{% for message in messages %}<|start_header_id|>{{ message['role'] }}"
    "<|end_header_id|>\n\n{{ message['content'] | trim }}<|eot_id|>{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)


def request(question: str, *steps: str) -> ScoreRequest:
    return ScoreRequest(Problem(question, question), steps)


def requests() -> list[ScoreRequest]:
    """Of different lengths; the second last step of the third has its delimiter, and nothing follows it."""
    made: list[ScoreRequest] = []
    for question, text in ANSWERS:
        *pieces, last = text.split(DELIMITER)
        made.append(request(question, *(piece + DELIMITER for piece in pieces), *([last] if last else [])))
    return made


def plain(one: ScoreRequest) -> tuple[str, list[str]]:
    """Question and steps as the snippets of the model cards have them: split at the delimiter."""
    return one.problem.question, [step.strip() for step in one.steps]


# ---------------------------------------------------------------- tokenizers and models


def wrapped(tokenizer: Tokenizer, **special: Any) -> Any:
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=1024, **special)


def byte_level(specials: Sequence[str], **wrapping: Any) -> Any:
    """As Qwen's and Llama 3's: byte-level BPE."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=420, special_tokens=list(specials), initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    return wrapped(tokenizer, **wrapping)


def qwen_tokenizer(**more: Any) -> Any:
    specials = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<extra_0>"]
    return byte_level(
        specials,
        **{"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>", "chat_template": CHATML}
        | {"additional_special_tokens": ["<|im_start|>", "<extra_0>"]}
        | more,
    )


def llama_tokenizer() -> Any:
    specials = ["<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
    tokenizer = byte_level(
        specials, bos_token=specials[0], eos_token=specials[3], additional_special_tokens=specials[1:3]
    )
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<|begin_of_text|> $A", special_tokens=[("<|begin_of_text|>", 0)]
    )
    tokenizer.chat_template = LLAMA3
    return tokenizer


def mistral_tokenizer(*, corpus: Sequence[str] = ("What is it? \u043a\u0438 + -",)) -> Any:
    """As Llama 2's: a sentence piece that spaces are written into, BOS before all."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    tokenizer.decoder = decoders.Sequence([decoders.Replace("\u2581", " "), decoders.Fuse()])
    trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=["<unk>", "<s>", "</s>"], show_progress=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Split("\u2581", "merged_with_next")  # for the training alone
    tokenizer.train_from_iterator([*CORPUS, *list(corpus) * 20], trainer)
    tokenizer.pre_tokenizer = None
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return wrapped(tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


def saved(tokenizer: Any, folder: Path) -> Any:
    """As whoever loads the folder gets it: some architectures have tokenizers with rules of their own."""
    from transformers import AutoTokenizer

    tokenizer.save_pretrained(folder)
    return AutoTokenizer.from_pretrained(folder)


class QwenPrm(nn.Module):
    """What the checkpoint's own code makes of its weights."""

    def __init__(self, config: Any):
        from transformers import Qwen2Model

        super().__init__()
        self.model = Qwen2Model(config)
        self.score = nn.Sequential(nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 2))

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.score(self.model(ids).last_hidden_state)


class ValueModel(nn.Module):
    """A language model in a wrapper with a value head."""

    def __init__(self, config: Any):
        from transformers import Qwen2ForCausalLM

        super().__init__()
        self.pretrained_model = Qwen2ForCausalLM(config)
        self.v_head = nn.ModuleDict({"summary": nn.Linear(32, 1)})

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        states = self.pretrained_model(ids, output_hidden_states=True).hidden_states[-1]
        return self.v_head["summary"](states).squeeze(-1)


def save_raw(folder: Path, weights: dict[str, torch.Tensor], config: Any, **changes: Any) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    save_file({name: value.contiguous() for name, value in weights.items()}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config.to_dict() | changes))


def save_qwen_prm(folder: Path) -> Callable[[ScoreRequest], list[float]]:
    from transformers import Qwen2Config

    tokenizer = qwen_tokenizer()
    config = Qwen2Config(vocab_size=len(tokenizer), **CONFIG)
    model = QwenPrm(config).eval()
    save_raw(
        folder,
        model.state_dict(),
        config,
        architectures=["Qwen2ForProcessRewardModel"],
        auto_map={"AutoModel": "modeling_qwen2_rm.Qwen2ForProcessRewardModel"},
    )
    tokenizer = saved(tokenizer, folder)

    def reference(one: ScoreRequest) -> list[float]:
        question, steps = plain(one)
        messages = [
            {"role": "system", "content": "Please reason step by step, and put your final answer within \\boxed{}."},
            {"role": "user", "content": question},
            {"role": "assistant", "content": "<extra_0>".join(steps) + "<extra_0>"},
        ]
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=False)
        ids = tokenizer.encode(text, return_tensors="pt")
        masks = ids == tokenizer.encode("<extra_0>")[0]
        return F.softmax(model(ids), dim=-1)[0][masks[0]][:, 1].tolist()

    return reference


def save_math_shepherd(folder: Path, **more: Any) -> Callable[[ScoreRequest], list[float]]:
    from transformers import MistralConfig, MistralForCausalLM

    tokenizer = mistral_tokenizer()
    model = MistralForCausalLM(MistralConfig(vocab_size=len(tokenizer), **CONFIG, **more)).eval()
    model.save_pretrained(folder)
    tokenizer = saved(tokenizer, folder)
    candidates = tokenizer.encode("+ -")[1:]
    step_tag = tokenizer.encode("\u043a\u0438")[-1]
    assert len(candidates) == 2

    def reference(one: ScoreRequest) -> list[float]:
        question, steps = plain(one)
        output = "\n".join(f"{step} \u043a\u0438" for step in steps)
        ids = torch.tensor([tokenizer.encode(f"{question} {output}")])
        scores = model(ids).logits[:, :, candidates].softmax(dim=-1)[:, :, 0]
        return scores[ids == step_tag].tolist()

    return reference


def save_rlhflow(folder: Path) -> Callable[[ScoreRequest], list[float]]:
    from transformers import LlamaConfig, LlamaForCausalLM

    tokenizer = llama_tokenizer()
    model = LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **CONFIG)).eval()
    model.save_pretrained(folder)
    tokenizer = saved(tokenizer, folder)
    candidates = [tokenizer.encode("+")[-1], tokenizer.encode("-")[-1]]

    def reference(one: ScoreRequest) -> list[float]:
        question, steps = plain(one)
        conversation, scores = [], []
        for k, step in enumerate(steps):
            conversation.append({"role": "user", "content": f"{question} {step}" if k == 0 else step})
            conversation.append({"role": "assistant", "content": "+"})
            ids = tokenizer.apply_chat_template(conversation, return_tensors="pt", return_dict=False)
            scores.append(model(ids).logits[0, -3, candidates].softmax(dim=-1)[0].item())
        return scores

    return reference


def save_skywork(folder: Path, *, prefix: str = "", model_type: str = "qwen2") -> Callable[[ScoreRequest], list[float]]:
    from transformers import Qwen2Config

    tokenizer = qwen_tokenizer(bos_token="<|endoftext|>", chat_template=None)
    config = Qwen2Config(vocab_size=len(tokenizer), **CONFIG)
    model = ValueModel(config).eval()
    weights = {f"{prefix}{name}": value for name, value in model.pretrained_model.state_dict().items()}
    weights |= {f"v_head.{name}": value for name, value in model.v_head.state_dict().items()}
    save_raw(folder, weights, config, architectures=["Qwen2ForPrmModel"], model_type=model_type)
    tokenizer = saved(tokenizer, folder)

    def reference(one: ScoreRequest) -> list[float]:
        problem, steps = plain(one)
        ids = tokenizer.encode(tokenizer.bos_token + problem + "\n")
        flags = [0] * len(ids)
        for step in steps:
            step_ids = [*tokenizer.encode(step), tokenizer.encode("\n")[-1]]
            ids += step_ids
            flags += [0] * (len(step_ids) - 1) + [1]
        return model(torch.tensor([ids])).sigmoid()[0][torch.tensor(flags) == 1].tolist()

    return reference


def save_token_classifier(
    folder: Path, *, labels: Sequence[str] = ("wrong", "right"), separator: str = "\n", right: int = 1
) -> Callable[[ScoreRequest], list[float]]:
    from transformers import Qwen2Config, Qwen2ForTokenClassification

    tokenizer = qwen_tokenizer(chat_template=None)
    names = dict(enumerate(labels))
    config = Qwen2Config(vocab_size=len(tokenizer), num_labels=len(labels), id2label=names, **CONFIG)
    model = Qwen2ForTokenClassification(config).eval()
    nn.init.normal_(model.score.bias)
    model.save_pretrained(folder)
    tokenizer = saved(tokenizer, folder)

    def reference(one: ScoreRequest) -> list[float]:
        question, steps = plain(one)
        ids, ends = tokenizer(question, add_special_tokens=False)["input_ids"], []
        for step in steps:
            ids = ids + tokenizer(step, add_special_tokens=False)["input_ids"]
            ids = ids + tokenizer.encode(separator, add_special_tokens=False)
            ends.append(len(ids) - 1)
        logits = model(torch.tensor([ids])).logits[0, ends]
        return (logits.softmax(-1)[:, right] if len(labels) == 2 else logits.sigmoid()[:, 0]).tolist()

    return reference


def save_sequence_classifier(
    folder: Path, *, num_labels: int = 1, pad: str | None = "<|endoftext|>"
) -> Callable[[ScoreRequest], list[float]]:
    from transformers import LlamaConfig, LlamaForSequenceClassification

    tokenizer = qwen_tokenizer()
    pad_id = None if pad is None else tokenizer.convert_tokens_to_ids(pad)
    config = LlamaConfig(vocab_size=len(tokenizer), num_labels=num_labels, pad_token_id=pad_id, **CONFIG)
    model = LlamaForSequenceClassification(config).eval()
    model.save_pretrained(folder)
    tokenizer = saved(tokenizer, folder)

    def reference(one: ScoreRequest) -> list[float]:
        answer = "".join(one.steps).strip()
        chat = [{"role": "user", "content": one.problem.question}, {"role": "assistant", "content": answer}]
        logits = model(tokenizer.apply_chat_template(chat, return_tensors="pt", return_dict=False)).logits[0]
        return [(logits.softmax(-1)[1] if num_labels == 2 else logits[0].sigmoid()).item()]

    return reference


TASK: Any = SimpleNamespace(name="sums", step_delimiter=DELIMITER)


def settings_of(folder: Path | str, format: str, **settings: Any) -> PretrainedVerifier:
    return PretrainedVerifier.model_validate({"type": "pretrained", "path": str(folder), "format": format} | settings)


def load(folder: Path, format: str, **settings: Any) -> Pretrained:
    verifier = load_pretrained(TASK, settings_of(folder, format, **settings))
    assert isinstance(verifier, Pretrained)
    return verifier


FORMATS: dict[str, tuple[str, Callable[..., Any], dict[str, Any], dict[str, Any]]] = {
    "qwen_prm": ("qwen_prm", save_qwen_prm, {}, {}),
    "math_shepherd": ("math_shepherd", save_math_shepherd, {}, {}),
    "math_shepherd without a window": ("math_shepherd", save_math_shepherd, {"sliding_window": None}, {}),
    "rlhflow": ("rlhflow", save_rlhflow, {}, {}),
    "skywork": ("skywork", save_skywork, {}, {}),
    "skywork in a wrapper": ("skywork", save_skywork, {"prefix": "pretrained_model.", "model_type": "qwen2_rm"}, {}),
    "tokens": ("token_classifier", save_token_classifier, {}, {}),
    "tokens named": (
        "token_classifier",
        save_token_classifier,
        {"labels": ("good", "bad"), "right": 0, "separator": "\n\n"},
        {"positive": "good", "separator": "\n\n"},
    ),
    "tokens, one label": ("token_classifier", save_token_classifier, {"labels": ("reward",)}, {}),
    "sequences": ("sequence_classifier", save_sequence_classifier, {}, {}),
    "sequences, two labels": ("sequence_classifier", save_sequence_classifier, {"num_labels": 2}, {}),
    "sequences, no padding": ("sequence_classifier", save_sequence_classifier, {"pad": None}, {}),
    "sequences that end in padding": ("sequence_classifier", save_sequence_classifier, {"pad": "\u010a"}, {}),
}
