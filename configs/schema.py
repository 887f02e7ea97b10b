"""Every knob of a round, as data. Strict: unknown keys are refused. Defaults are the vetted settings.

A file in this folder is one loop; `configs.load` reads it. No heavy imports here.
"""

from __future__ import annotations

import re
from typing import Annotated, Literal
from urllib.parse import urlsplit

from pydantic import BaseModel, ConfigDict, Field, JsonValue, PositiveInt, model_validator

Fraction = Annotated[float, Field(ge=0, le=1)]
Slug = Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9._-]{0,63}$")]


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class Loop(Section):
    name: Slug = Field(description="folder of the loop under the runs folder, and its MLflow experiment")
    seed: int = Field(default=0, ge=0, description="every random draw of the loop follows from it")
    rounds: PositiveInt = Field(default=3, description="rounds of `ratchet loop` without --rounds")


# ---------------------------------------------------------------- tasks


class CountdownTask(Section):
    """Reach a target with every number used once. Generated; needs nothing."""

    type: Literal["countdown"]
    min_numbers: int = Field(default=3, ge=2, le=6)
    max_numbers: int = Field(default=5, ge=2, le=6)
    max_value: int = Field(default=12, ge=2, le=50, description="numbers are drawn from 1..max_value")
    max_intermediate: int = Field(default=99, ge=10, le=99, description="every result lies in 1..max_intermediate")


class ArithmeticTask(Section):
    """Evaluate a chain of operations left to right, one a line. Generated; the base learns from a flawed teacher."""

    type: Literal["arithmetic"]
    min_operations: int = Field(default=2, ge=1, description="shorter chains are facts, not problems: never held out")
    max_operations: int = Field(default=10, ge=1, le=16)
    max_operand: int = Field(default=12, ge=2, le=96)
    modulus: int = Field(
        default=31, ge=11, le=97, description="a prime, so that slips rarely cancel; the base learns small ones faster"
    )


class FileTask(Section):
    """Problems from a file or a hub data set."""

    path: str = Field(description="a .jsonl file, or the hub name of a data set")
    test_path: str | None = Field(default=None, description="problems that belong to the test split only")
    hub_config: str | None = None
    hub_split: str = "train"
    hub_test_split: str = "test"
    revision: str | None = Field(default=None, description="commit of the hub data set")
    question_column: str = "question"
    answer_column: str = "answer"
    id_column: str | None = None
    prompt: Literal["chat", "few_shot", "plain"] = Field(
        default="chat", description="chat needs a model with a chat template; few_shot is for base models"
    )
    instruction: str | None = Field(default=None, description="system message; the task's own where not given")
    step_delimiter: str = "\n\n"
    max_bad_rows: Fraction = Field(default=0.05, description="share of unusable rows above which loading fails")
    grader_seconds: float = Field(default=5.0, gt=0, description="wall and CPU limit of grading one answer")
    grader_memory_mib: PositiveInt = 2048
    grader_workers: PositiveInt = 2


class Gsm8kTask(FileTask):
    type: Literal["gsm8k"]
    path: str = "openai/gsm8k"
    hub_config: str | None = "main"


class MathTask(FileTask):
    type: Literal["math"]
    path: str = "HuggingFaceH4/MATH-500"
    hub_split: str = "test"
    question_column: str = "problem"


class JsonlTask(FileTask):
    """The user's own questions. `answer_type`: how an answer is compared with the gold one."""

    type: Literal["jsonl"]
    answer_type: Literal["math", "number", "choice", "text"] = "math"


CHECKS_STEPS = ("countdown", "arithmetic")  # the types of tasks that can say whether a step is right

TaskConfig = Annotated[CountdownTask | ArithmeticTask | Gsm8kTask | MathTask | JsonlTask, Field(discriminator="type")]


class Splits(Section):
    """Shares of the problems, decided by a hash of the key and fixed for the loop."""

    train: Fraction = 0.7
    fit: Fraction = 0.075
    validation: Fraction = 0.075
    gate: Fraction = 0.075
    test: Fraction = 0.075

    @model_validator(mode="after")
    def _sum(self) -> Splits:
        total = self.train + self.fit + self.validation + self.gate + self.test
        if abs(total - 1) > 1e-9:
            raise ValueError(f"the five shares add up to {total:g}, not 1")
        return self


# ---------------------------------------------------------------- models and engines


class Lora(Section):
    rank: PositiveInt = 32
    alpha: PositiveInt = 64
    dropout: Fraction = 0.0
    target_modules: str = "all-linear"


class Model(Section):
    base: str = Field(
        default="bootstrap",
        description="'bootstrap': train the tiny embedded base; 'scripted'; else a folder or hub name",
    )
    revision: str | None = Field(default=None, description="commit of the hub model")
    dtype: Literal["float32", "bfloat16", "auto"] = "auto"
    trust_remote_code: bool = False
    attn_implementation: Literal["auto", "eager", "sdpa", "flash_attention_2"] = "auto"


class Bootstrap(Section):
    """The embedded base model: a tiny Llama trained from scratch on generated demonstrations."""

    hidden_size: PositiveInt = 96
    layers: PositiveInt = 3
    heads: PositiveInt = Field(default=3, description="32 wide each: vLLM on CPUs runs no heads of 24")
    key_value_heads: PositiveInt | None = Field(default=None, description="default: as many as heads")
    feed_forward: PositiveInt = Field(default=3, description="width of the feed-forward layers, in hidden sizes")
    examples: PositiveInt = Field(default=60_000, description="demonstrations generated")
    epochs: PositiveInt = 1
    batch_size: PositiveInt = 128
    learning_rate: float = Field(
        default=0.02, gt=0, description="of Muon; the rest follows AdamW at adamw_learning_rate"
    )
    adamw_learning_rate: float = Field(default=2e-3, gt=0)
    warmup: Fraction = 0.05
    solved: Fraction = Field(default=0.3, description="countdown: share of demonstrations that solve their problem")
    teacher_errors: Fraction = Field(
        default=1.0, description="arithmetic: how often the teacher makes its systematic slips, 0 never, 1 always"
    )
    short: Fraction = Field(default=0.65, description="arithmetic: share of demonstrations with at most 4 operations")

    @model_validator(mode="after")
    def _heads(self) -> Bootstrap:
        if self.hidden_size % self.heads:
            raise ValueError(f"hidden_size = {self.hidden_size} is no multiple of heads = {self.heads}")
        if self.heads % (self.key_value_heads or self.heads):
            raise ValueError(f"heads = {self.heads} is no multiple of key_value_heads = {self.key_value_heads}")
        return self


class ScriptedEngine(Section):
    """Answers from a script, in no time: for tests, the smoke round and plans."""

    type: Literal["scripted"]
    accuracy: Fraction = Field(default=0.5, description="chance that a sample is right, before skill")
    skill_per_round: Fraction = Field(default=0.1, description="added to the accuracy by each distilled round")


class TransformersEngine(Section):
    type: Literal["transformers"] = "transformers"
    device: str = Field(default="auto", description="'auto', 'cpu', 'cuda', 'cuda:1', ...")
    batch_tokens: PositiveInt = Field(
        default=65_536, description="most tokens (rows x length) held in one batch's cache"
    )
    max_batch_rows: PositiveInt = 1024
    cache_tokens: int | None = Field(
        default=None,
        ge=0,
        description="prefix tokens whose keys and values are kept between the steps of a search; default: "
        "batch_tokens, but at most 1 GiB a process on CPUs and a quarter of the free memory on GPUs",
    )
    processes: int = Field(
        default=1, ge=0, description="on CPUs: processes that share a stage's shards, 0 for one a core; for tiny models"
    )


class VllmEngine(Section):
    """vLLM in this process's care; one for each group of `tensor_parallel` GPUs. Needs vLLM 0.32."""

    type: Literal["vllm"]
    tensor_parallel: PositiveInt = Field(default=1, description="GPUs that share one copy of the model")
    gpu_memory_fraction: Fraction = Field(default=0.9, description="of each GPU's memory")
    kv_cache_gib: float | None = Field(
        default=None, gt=0, description="memory of keys and values; default: on CPUs 2, on GPUs what is left"
    )
    max_num_seqs: PositiveInt = Field(default=256, description="requests computed together")
    max_model_len: PositiveInt | None = Field(
        default=None, description="context length in tokens; default: the model's. A shorter one needs less memory"
    )
    block_size: PositiveInt | None = Field(
        default=None, description="tokens of one block of the prefix cache; default: on CPUs 32, on GPUs vLLM's own"
    )
    enforce_eager: bool = Field(default=False, description="start faster, run slower; on CPUs always so")
    own_process: bool | None = Field(
        default=None,
        description="run vLLM's core in a process of its own; default: on GPUs yes, its end frees their memory, "
        "on CPUs no, it starts sooner and answers small batches faster",
    )
    processes: int = Field(
        default=1, ge=0, description="on CPUs: processes that share a stage's shards, 0 for one a core; for tiny models"
    )


class ServerEngine(Section):
    """Any OpenAI-compatible completions server. It serves one policy: for search, eval and solve, not for rounds."""

    type: Literal["server"]
    url: str = Field(default="http://127.0.0.1:8000/v1", description="what clients call the base URL; http or https")
    model: str | None = Field(default=None, description="as the server names it; default: the first it lists")
    api_key_env: str | None = Field(default=None, description="NAME of the environment variable that holds the key")
    tokenizer: str | None = Field(default=None, description="folder or hub name; default: the policy's")
    policy: str | None = Field(
        default=None, description="folder or hub name of the policy that is served, where the server does not tell"
    )
    max_concurrency: PositiveInt = Field(default=128, description="requests in flight; the rest wait here")
    timeout_s: float = Field(default=600, gt=0, description="of one attempt, from sending to the last byte")
    retries: int = Field(default=5, ge=0, description="of a request, after 429, 5xx, timeouts and broken connections")
    backoff_s: float = Field(default=0.5, gt=0, description="wait before the first retry; doubles, with jitter")
    max_length: PositiveInt | None = Field(default=None, description="context length; default: what the server tells")
    flops_parameters: int | None = Field(
        default=None, ge=0, description="parameters a token passes through; default: counted from the policy's config"
    )
    seeds: bool = Field(
        default=True, description="a seed for every request; without, those of one prefix go out as one: faster"
    )
    stream: bool = Field(
        default=False, description="receive tokens as they come: a cancelled request then counts what it had generated"
    )
    extra_body: dict[str, JsonValue] = Field(default={}, description="added to the body of every request")

    @model_validator(mode="after")
    def _safe(self) -> ServerEngine:
        """Without echoing a value that may hold a secret: these messages are printed and logged."""
        parts = urlsplit(self.url)
        if "@" in parts.netloc or parts.query or parts.fragment:
            raise ValueError("url holds a user name, password or query: name the variable of a key in api_key_env")
        if parts.scheme not in ("http", "https") or not parts.hostname or parts.port == 0:
            raise ValueError(f"url = '{self.url}' is no address: it begins with http:// or https:// and a host")
        if self.api_key_env is not None and not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", self.api_key_env):
            raise ValueError("api_key_env is the NAME of an environment variable (OPENAI_API_KEY), never the key")
        if taken := sorted(_OWN_FIELDS & self.extra_body.keys()):
            raise ValueError(f"extra_body may not set {', '.join(taken)}: the search decides these for each request")
        return self


_OWN_FIELDS = frozenset(
    {"model", "prompt", "max_tokens", "temperature", "top_p", "stop", "seed", "n", "best_of", "echo", "suffix"}
    | {"stream", "stream_options", "logprobs", "return_token_ids", "return_tokens_as_token_ids", "ignore_eos"}
    | {"include_stop_str_in_output"}
)

EngineConfig = Annotated[ScriptedEngine | TransformersEngine | VllmEngine | ServerEngine, Field(discriminator="type")]


# ---------------------------------------------------------------- verifiers


class ScoringSection(Section):
    """A verifier. `scores_steps`: it scores every step, not finished answers alone."""

    @property
    def scores_steps(self) -> bool:
        return True


class NoVerifier(Section):
    """Nothing scores: answers are chosen by majority."""

    type: Literal["none"] = "none"


class OracleVerifier(ScoringSection):
    """The task's own checker with errors of a known rate. It sees the gold answers: for tests and benchmarks only."""

    type: Literal["oracle"]
    noise: Fraction = Field(default=0.0, description="share of step prefixes whose score is flipped, p to 1 - p")
    exploits: Fraction = Field(
        default=0.0, description="share of wrong step prefixes that score above every right one: what search exploits"
    )
    parameters: int = Field(default=0, ge=0, description="its size, for the FLOPs; 0: free")


class VerifierRuntime(ScoringSection):
    """How the model of a verifier is run."""

    runtime: Literal["transformers", "vllm"] = "transformers"
    device: str = Field(default="auto", description="'auto', 'cpu', 'cuda', 'cuda:1', ...")
    batch_tokens: PositiveInt = Field(default=65_536, description="most tokens (rows x length) of one batch")
    max_batch_rows: PositiveInt = 1024
    cache_tokens: int | None = Field(
        default=None,
        ge=0,
        description="prefix tokens whose keys and values are kept between the steps of a search; default: as of the "
        "transformers engine",
    )
    gpu_memory_fraction: Fraction = Field(default=0.3, description="runtime = 'vllm': of each GPU's memory")


LabelSource = Literal["rollouts", "siblings", "tree", "tree_siblings", "outcomes", "gold"]


class StepLabels(Section):
    """Solutions whose steps were labelled by people or other models: PRM800K and its like.

    Rows {"question", "steps": [text, ...], "labels": [...]}; PRM800K's own rows and those of TRL's stepwise supervision
    (prompt, completions, labels) are told by their columns. A label that is null carries no loss.
    """

    path: str = Field(description="a .jsonl file, or the hub name of a data set")
    hub_config: str | None = None
    hub_split: str = "train"
    revision: str | None = Field(default=None, description="commit of the hub data set")
    question_column: str = "question"
    steps_column: str = "steps"
    labels_column: str = "labels"
    scale: Literal["auto", "unit", "ratings"] = Field(
        default="auto",
        description="unit: labels lie in 0..1, or are true and false; ratings: -1 is wrong, 1 right, and 0, which is "
        "neutral, right too; auto: ratings where one is -1 and all are whole numbers",
    )
    max_examples: PositiveInt = Field(
        default=50_000, description="solutions taken; every question's first comes before any one's second"
    )
    max_bad_rows: Fraction = Field(default=0.05, description="share of unusable rows above which loading fails")


class TrainedVerifier(VerifierRuntime):
    """A verifier that every round trains on the policy's own answers, and keeps in the champion's bundle."""

    type: Literal["trained"]
    kind: Literal["prm", "orm"] = Field(default="prm", description="scores every step, or finished answers only")
    readout: Literal["generative", "scalar"] = Field(
        default="generative",
        description="generative: also reads the model's own log-probability of what was written; scalar: a head alone",
    )
    labels: tuple[LabelSource, ...] = Field(
        default=("tree",),
        min_length=1,
        description="where step labels come from: rollouts (Monte Carlo, the paper's), siblings (the same, relative to "
        "the steps beside it), tree (mean success of the answers that share a prefix: free), tree_siblings (that, "
        "relative to the steps beside it), outcomes (of whole answers, through a multiple-instance loss), gold (of "
        "tasks that can check a step, and of the data set `steps`)",
    )
    steps: StepLabels | None = Field(default=None, description="labels = gold: a data set of labelled solutions")
    init: Literal["policy", "base"] = Field(default="policy", description="initial weights, without an older verifier")
    warm_start: bool = Field(default=True, description="go on from the champion's verifier")
    problems: PositiveInt = Field(default=1000, description="training problems on which the winner draws fresh answers")
    samples: PositiveInt = Field(default=16, description="fresh answers of each")
    rollouts: PositiveInt = Field(default=16, description="labels = rollouts: answers drawn from each step")
    first_error: bool = Field(
        default=False, description="labels = rollouts: find the first wrong step by binary search, and skip the rest"
    )
    keep_unparsable: bool = Field(
        default=False, description="train on answers without an extractable answer too, as wrong ones"
    )
    max_examples: PositiveInt = Field(default=50_000, description="answers trained on; the newest rounds come first")
    wrong_per_right: float | None = Field(
        default=None,
        gt=0,
        description="at most so many wrong answers for each right one of a question, at least one; default: all",
    )
    prefix_weight: float = Field(
        default=1.0, gt=0, description="of the labels of steps before the last, which a few answers only estimate"
    )
    method: Literal["full", "lora"] = "full"
    lora: Lora = Lora()
    epochs: float = Field(default=1, gt=0, description="at most; the best weights on validation are kept")
    batch_size: PositiveInt = Field(default=128, description="answers of one optimizer step")
    micro_batch_size: PositiveInt = 128
    optimizer: Literal["adamw", "muon"] = "adamw"
    learning_rate: float = Field(default=3e-5, gt=0)
    adamw_learning_rate: float = Field(default=2e-3, gt=0, description="muon: of everything but the matrices")
    schedule: Literal["linear", "cosine", "constant"] = "cosine"
    warmup: Fraction = 0.05
    weight_decay: float = Field(default=0.0, ge=0)
    dropout: Fraction = Field(default=0.05, description="before the head")
    max_length: PositiveInt = 2048
    max_grad_norm: float = Field(default=1.0, gt=0)
    gradient_checkpointing: bool = False
    validation: Fraction = Field(default=0.1, description="share of the questions, for early stopping")
    checks: PositiveInt = Field(default=8, description="times the validation loss is measured")
    aggregation: Literal["choose", "last", "min", "prod", "mean"] = Field(
        default="choose", description="of step scores; choose: the best on the fit problems"
    )
    flip_labels: Fraction = Field(default=0.0, description="share of labels turned round: to measure robustness")

    @property
    def scores_steps(self) -> bool:
        return self.kind == "prm"

    @model_validator(mode="after")
    def _batches(self) -> TrainedVerifier:
        if self.batch_size % self.micro_batch_size:
            raise ValueError(
                f"batch_size = {self.batch_size} is not a multiple of micro_batch_size = {self.micro_batch_size}"
            )
        return self

    @model_validator(mode="after")
    def _labelled_steps(self) -> TrainedVerifier:
        if self.steps is None:
            return self
        if "gold" not in self.labels:
            raise ValueError(
                f"steps.path = '{self.steps.path}' is read where labels has 'gold', and it is {list(self.labels)}: add "
                "'gold', or leave [verifier.steps] out"
            )
        if self.kind == "orm":
            raise ValueError("steps holds labels of steps, and kind = 'orm' learns from none: set kind = 'prm'")
        return self


class PretrainedVerifier(VerifierRuntime):
    """A verifier from elsewhere, by the format of its checkpoint."""

    type: Literal["pretrained"]
    path: str = Field(description="folder or hub name")
    revision: str | None = None
    format: Literal[
        "ratchet", "qwen_prm", "math_shepherd", "rlhflow", "skywork", "token_classifier", "sequence_classifier"
    ] = Field(description="ratchet: a folder that `ratchet round` trained; the others as published")
    aggregation: Literal["last", "min", "prod", "mean"] = "last"
    separator: str | None = Field(default=None, description="text after each step; default: the format's own")
    positive: str | None = Field(default=None, description="text of the token, or name of the label, that means right")
    negative: str | None = None
    system: str | None = Field(default=None, description="system message; default: the format's own")
    dtype: Literal["float32", "bfloat16", "auto"] = "auto"
    trust_remote_code: bool = False

    @property
    def scores_steps(self) -> bool:
        return self.format != "sequence_classifier"


class JudgeVerifier(ScoringSection):
    """A language model behind a completions or chat server that is asked for a verdict."""

    type: Literal["judge"]
    url: str = "http://127.0.0.1:8000/v1"
    model: str | None = Field(default=None, description="as the server names it; default: the first it lists")
    api_key_env: str | None = Field(default=None, description="NAME of the environment variable that holds the key")
    process: bool = Field(default=False, description="a verdict for every step; else one for the finished answer")
    votes: PositiveInt = Field(default=1, description="verdicts asked for; the score is their mean")
    temperature: float = Field(default=0.0, ge=0)
    max_new_tokens: PositiveInt = 512
    prompt: str | None = Field(default=None, description="with {question} and {answer}; default: our own")
    max_concurrency: PositiveInt = 32
    timeout_s: float = Field(default=600, gt=0)
    retries: int = Field(default=5, ge=0)

    @property
    def scores_steps(self) -> bool:
        return self.process


class CertaintyVerifier(VerifierRuntime):
    """The policy's own confidence in what it wrote: no training, no labels."""

    type: Literal["certainty"]
    measure: Literal["self_certainty", "logprob"] = Field(
        default="self_certainty",
        description="self_certainty: mean divergence of the next-token distributions from uniform; logprob: mean "
        "log-probability of the tokens written",
    )


VerifierConfig = Annotated[
    NoVerifier | OracleVerifier | TrainedVerifier | PretrainedVerifier | JudgeVerifier | CertaintyVerifier,
    Field(discriminator="type"),
]


# ---------------------------------------------------------------- stages


class Sampling(Section):
    temperature: float = Field(default=1.0, ge=0)
    max_new_tokens: PositiveInt = 64


class Search(Section):
    problems: PositiveInt = Field(default=3000, description="training problems of one round")
    strategy: str = Field(
        default="best_of_n",
        description="what the budget is spent on: best_of_n, beam(width=2), step_rejection, ...; optimal: by the "
        "champion's StrategyTable, for as many FLOPs as best_of_n would take",
    )
    samples: PositiveInt = Field(
        default=16, description="budget of a problem in answers, the first `probe_samples` plain ones included"
    )
    probe_samples: PositiveInt = Field(
        default=4, description="k0 plain samples a problem: they make the difficulty labels"
    )
    shard_problems: PositiveInt = Field(default=500, description="problems committed together")
    max_tokens: PositiveInt | None = Field(default=None, description="hard cap on generated tokens of a round's search")

    @model_validator(mode="after")
    def _probe(self) -> Search:
        if self.probe_samples > self.samples:
            raise ValueError(f"probe_samples = {self.probe_samples} is more than samples = {self.samples}")
        return self


class Select(Section):
    max_per_problem: PositiveInt = Field(default=4, description="distinct correct solutions kept of one problem")
    rounds: Literal["all", "last"] = Field(
        default="all", description="pool the searched answers of all rounds, or the last"
    )
    replay: float = Field(
        default=0.15, ge=0, lt=1, description="share of training rows taken from the base model's own data"
    )
    min_rows: PositiveInt = Field(default=50, description="fewer rows than this end the round with the old champion")
    max_response_tokens: PositiveInt | None = None


class Distill(Section):
    init: Literal["base", "champion", "previous"] = "base"
    method: Literal["full", "lora"] = "full"
    lora: Lora = Lora()
    epochs: float = Field(default=2, gt=0)
    max_steps: int = Field(default=-1, description="-1: by epochs")
    batch_size: PositiveInt = Field(default=64, description="rows of one optimizer step")
    micro_batch_size: PositiveInt = Field(default=64, description="rows of one forward pass")
    optimizer: Literal["adamw", "muon"] = "adamw"
    learning_rate: float = Field(default=1e-5, gt=0)
    adamw_learning_rate: float = Field(
        default=2e-3, gt=0, description="muon: learning rate of everything but the matrices"
    )
    schedule: Literal["linear", "cosine", "constant"] = "cosine"
    warmup: Fraction = 0.05
    weight_decay: float = Field(default=0.0, ge=0)
    max_length: PositiveInt = 2048
    max_grad_norm: float = Field(default=1.0, gt=0)
    gradient_checkpointing: bool = False
    checkpoint_steps: PositiveInt = Field(
        default=200, description="optimizer steps between checkpoints a resume may use"
    )

    @model_validator(mode="after")
    def _batches(self) -> Distill:
        if self.batch_size % self.micro_batch_size:
            raise ValueError(
                f"batch_size = {self.batch_size} is not a multiple of micro_batch_size = {self.micro_batch_size}"
            )
        return self


class ChainVerifier(TrainedVerifier):
    """Scores the answers of chains and reads the attempts before them; [verifier] with other defaults."""

    type: Literal["trained"] = "trained"
    kind: Literal["prm", "orm"] = "orm"

    @model_validator(mode="after")
    def _labelled_steps(self) -> ChainVerifier:
        if self.steps is not None:
            raise ValueError("revision.verifier takes no steps: chains are labelled by their outcomes")
        return self


class Revision(Section):
    """A second policy, trained to mend the winner's wrong answers, and the verifier that reads its chains.

    Snell et al. 2024, section 6.1. Its answers come in chains, each attempt shown the last few before it.
    """

    enabled: bool = False
    problems: PositiveInt = Field(
        default=2000,
        description="training problems: on one part of them the winner draws fresh answers to train on, the other, "
        "verifier.problems but at most half, is kept for the verifier",
    )
    samples: PositiveInt = Field(default=16, description="fresh answers of each; the paper draws 64")
    max_attempts: PositiveInt = Field(default=4, description="wrong answers shown: 0 to as many, each as often")
    per_problem: PositiveInt = Field(default=4, description="distinct right answers trained on of one problem")
    per_answer: PositiveInt = Field(default=1, description="trajectories that end in one right answer")
    keep_right: Fraction = Field(
        default=0.5,
        description="share of trajectories whose last attempts are right already, and stay: not the paper's",
    )
    init: Literal["base", "policy"] = Field(
        default="policy", description="initial weights: the round's winner, or the base as in the paper"
    )
    train: Distill = Field(default=Distill(), description="as [distill], but for its init")
    checkpoints: PositiveInt = Field(default=4, description="compared by how well they revise; the best is kept")
    turns: int = Field(default=4, ge=2, description="attempts of the chains by which they are compared")
    compared_problems: PositiveInt = Field(default=300, description="fit problems on which they are compared")
    verified: bool = Field(default=True, description="train a verifier of the chains, too")
    verifier: ChainVerifier = ChainVerifier()


Predictor = Literal["ridge", "mlp", "tokens", "sequence"]


class SequencePredictor(Section):
    """predictors = "sequence": the policy's own weights, tuned to say how often it will be right."""

    method: Literal["full", "lora"] = Field(
        default="lora", description="full keeps a copy of all weights in the bundle"
    )
    lora: Lora = Lora(rank=16, alpha=32)
    pooling: Literal["last", "tokens"] = Field(
        default="last",
        description="last: a head on the last prompt token; tokens: every token of the prompt adds its own difficulty",
    )
    epochs: PositiveInt = Field(default=8, description="at most; training stops where the held-out loss rises")
    patience: PositiveInt = Field(default=2, description="epochs without a better held-out loss before it stops")
    held_out: Fraction = Field(default=0.2, description="share of the fit problems that decide when to stop")
    batch_size: PositiveInt = 32
    micro_batch_size: PositiveInt = Field(default=32, description="prompts computed at once")
    learning_rate: float = Field(default=2e-3, gt=0, description="2e-4 suits LoRA on large models, 1e-5 full ones")
    weight_decay: float = Field(default=0.01, ge=0)
    warmup: Fraction = 0.1
    max_grad_norm: float = Field(default=1.0, gt=0)


class Difficulty(Section):
    problems: PositiveInt = Field(
        default=1000, description="fit problems labelled by plain samples, besides the search's own"
    )
    samples: PositiveInt = 16
    predictors: tuple[Predictor, ...] = Field(
        default=("ridge", "mlp", "tokens"),
        description="kinds that are fitted; the one that predicts held-out fit problems best is kept. ridge: linear in "
        "the prompt's hidden states; mlp: two layers on them; tokens: every token of the prompt adds its own "
        "difficulty; sequence: a fine-tuned copy of the policy, whose own forward pass every prediction costs",
    )
    sequence: SequencePredictor = SequencePredictor()
    layers: Literal["all", "choose"] = Field(default="choose", description="which hidden layers feed the ridge")
    binning: Literal["quantile", "absolute"] = Field(
        default="quantile", description="quantile: `bins` of equal size; absolute: cut at `edges`, whatever the policy"
    )
    bins: PositiveInt = Field(default=5, description="quantile bins of predicted difficulty")
    edges: tuple[Fraction, ...] = Field(
        default=(0.1, 0.5), description="pass rates at which absolute bins are cut: hard, medium and easy"
    )

    @model_validator(mode="after")
    def _sets(self) -> Difficulty:
        if not self.predictors or len(set(self.predictors)) < len(self.predictors):
            raise ValueError(f"predictors = {list(self.predictors)}: name at least one kind, and each once")
        if list(self.edges) != sorted(set(self.edges)) or not self.edges:
            raise ValueError(f"edges = {list(self.edges)}: give at least one pass rate, ascending")
        return self


class Table(Section):
    """The compute-optimal choice: which strategy with which budget, by predicted difficulty; fitted in every round.

    Snell et al. 2024, section 3.2. Its bins are difficulty.bins of the predicted pass rate.
    """

    enabled: bool = False
    problems: PositiveInt = Field(default=300, description="validation problems on which strategies are measured")
    strategies: tuple[str, ...] = Field(
        default=(
            "greedy",
            "pass",
            "majority",
            "best_of_n",
            "best_of_n_weighted",
            "beam(width=4)",
            "step_rejection(draws=16, greedy=true, trust=0.95, give_up=true)",
        ),
        description="what may be chosen; those that need a verifier, or steps scored, are left out where there is none",
    )
    budgets: tuple[PositiveInt, ...] = Field(default=(1, 2, 4, 8, 16), description="samples each is measured with")

    @model_validator(mode="after")
    def _some(self) -> Table:
        if not self.strategies or not self.budgets:
            raise ValueError("table.strategies and table.budgets may not be empty; set table.enabled = false instead")
        return self


class Evaluate(Section):
    test_problems: PositiveInt = Field(default=2000, description="greedy accuracy, paired between rounds")
    pool_problems: PositiveInt = Field(
        default=500, description="of the test problems: sampled for pass@k, maj@k, search@N"
    )
    pool_samples: PositiveInt = Field(default=64, description="samples per pool problem")
    k: tuple[PositiveInt, ...] = (1, 4, 16, 64)

    @model_validator(mode="after")
    def _k(self) -> Evaluate:
        if max(self.k) > self.pool_samples:
            raise ValueError(f"k = {max(self.k)} needs at least as many pool_samples, not {self.pool_samples}")
        if self.pool_problems > self.test_problems:
            raise ValueError(f"pool_problems = {self.pool_problems} is more than test_problems = {self.test_problems}")
        return self


class GuardSet(Section):
    """A file of problems the challenger must not do worse on. Uses the loop's own grader."""

    name: Slug
    path: str
    margin: Fraction = 0.02


class Gate(Section):
    problems: PositiveInt = Field(
        default=4000, description="greedy, paired; generated tasks draw a fresh set each round"
    )
    primary: Literal["greedy", "pass_at_1"] = "greedy"
    alpha: float = Field(default=0.05, gt=0, lt=0.5, description="spent over looks as alpha / (j (j + 1))")
    coverage_problems: PositiveInt = Field(default=1000, description="gate problems sampled for coverage")
    coverage_samples: PositiveInt = Field(default=32, description="samples drawn of each")
    coverage_k: PositiveInt = Field(
        default=16, description="coverage is pass@k; drawing more than k samples makes it exact enough to compare"
    )
    margin: Fraction = Field(default=0.02, description="how much worse coverage may be, by the lower 95 % bound")
    min_problems: PositiveInt = 200
    max_ungraded: Fraction = 0.01
    guards: tuple[GuardSet, ...] = ()

    @model_validator(mode="after")
    def _coverage(self) -> Gate:
        if self.coverage_k > self.coverage_samples:
            raise ValueError(f"coverage_k = {self.coverage_k} is more than coverage_samples = {self.coverage_samples}")
        return self


class Tracking(Section):
    mlflow: bool = True
    uri: str | None = Field(default=None, description="default: MLFLOW_TRACKING_URI, else SQLite in the runs folder")
    timeout_s: float = Field(default=5.0, gt=0, description="of one request")


class Orchestration(Section):
    prefect: Literal["auto", "on", "off"] = "auto"


class Stages(Section):
    in_process: bool = Field(default=False, description="run stages in this process: for tests and the smoke round")
    python: str | None = Field(
        default=None, description="interpreter of the stages' child processes; default: this one"
    )
    threads: PositiveInt | None = Field(default=None, description="torch threads of a stage; default: all cores")
    timeout_s: PositiveInt = Field(default=86_400, description="wall clock of one stage")


class Config(Section):
    """One loop."""

    loop: Loop
    task: TaskConfig
    splits: Splits = Splits()
    model: Model = Model()
    bootstrap: Bootstrap = Bootstrap()
    engine: EngineConfig = TransformersEngine()
    verifier: VerifierConfig = NoVerifier()
    sampling: Sampling = Sampling()
    search: Search = Search()
    select: Select = Select()
    distill: Distill = Distill()
    revision: Revision = Revision()
    difficulty: Difficulty = Difficulty()
    table: Table = Table()
    evaluate: Evaluate = Evaluate()
    gate: Gate = Gate()
    tracking: Tracking = Tracking()
    orchestration: Orchestration = Orchestration()
    stages: Stages = Stages()

    @property
    def answer_labels(self) -> tuple[LabelSource, ...]:
        """The sources of labels of the policy's own answers: `gold` is one where the task can check a step."""
        settings = self.verifier
        if settings.type != "trained":
            return ()
        checked = settings.kind == "orm" or self.task.type in CHECKS_STEPS  # an outcome verifier takes outcomes alone
        return tuple(source for source in settings.labels if checked or source != "gold")

    @model_validator(mode="after")
    def _gold(self) -> Config:
        settings = self.verifier
        if settings.type == "trained" and settings.steps is None and self.answer_labels != settings.labels:
            raise ValueError(
                f"verifier.labels has 'gold', but task.type = '{self.task.type}' cannot check a step: set "
                "verifier.steps.path to a data set of labelled solutions, or leave 'gold' out"
            )
        return self

    @model_validator(mode="after")
    def _consistent(self) -> Config:
        embedded = self.task.type in ("countdown", "arithmetic")
        if self.model.base == "bootstrap" and not embedded:
            raise ValueError(
                f"model.base = 'bootstrap' works for the generated tasks only; task.type = '{self.task.type}' "
                "needs a model folder or hub name"
            )
        if (self.model.base == "scripted") != (self.engine.type == "scripted"):
            raise ValueError("model.base = 'scripted' and engine.type = 'scripted' go together")
        if embedded and self.gate.problems < self.gate.min_problems:
            raise ValueError(
                f"gate.problems = {self.gate.problems} is below gate.min_problems = {self.gate.min_problems}"
            )
        return self
