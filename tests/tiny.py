"""Tiny models, tokenizers and data that tests make themselves: real Hugging Face folders, random weights."""

import importlib.util
import json
import os
import random
import socket
import subprocess
import sys
from pathlib import Path

import forked
import pytest

REPOSITORY = Path(__file__).resolve().parent.parent
WORDS = [f"w{i}" for i in range(90)]


def make_tokenizer(folder: Path, *, bert: bool) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    specials = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"] if bert else ["<unk>", "<eos>"]
    vocabulary = {token: i for i, token in enumerate([*specials, *WORDS, "query:", "passage:"])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=specials[1] if bert else "<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    if bert:
        tokenizer.post_processor = processors.TemplateProcessing(
            single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
        )
        names = dict(pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]")
    else:
        names = dict(unk_token="<unk>", eos_token="<eos>", pad_token="<eos>")  # pad equals eos, as many have it
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names).save_pretrained(folder)


_SIZE = dict(vocab_size=100, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4)
_BERT = _SIZE | dict(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
# Config class and settings by kind. RoBERTa and its kin count positions from padding_idx + 1.
MODELS = {
    "llama": ("LlamaConfig", _SIZE | dict(num_key_value_heads=2, max_position_embeddings=128)),
    "bert": ("BertConfig", _BERT | dict(max_position_embeddings=128)),
    "roberta": ("RobertaConfig", _BERT | dict(max_position_embeddings=130, pad_token_id=1, type_vocab_size=1)),
    "xlm-roberta": ("XLMRobertaConfig", _BERT | dict(max_position_embeddings=130, pad_token_id=1)),
    "mpnet": ("MPNetConfig", _BERT | dict(max_position_embeddings=130)),
    "distilbert": (
        "DistilBertConfig",
        dict(vocab_size=100, dim=32, hidden_dim=48, n_layers=2, n_heads=4, max_position_embeddings=128)
        | dict(dropout=0.0, attention_dropout=0.0),
    ),
    "modernbert": (
        "ModernBertConfig",
        _SIZE | dict(max_position_embeddings=128, pad_token_id=0, local_attention=8, global_attn_every_n_layers=2),
    ),
}
_DECODER = _SIZE | dict(num_key_value_heads=2, max_position_embeddings=128, pad_token_id=0)
_ALTERNATING = dict(sliding_window=5, layer_types=["sliding_attention", "full_attention"])
_GEMMA = _DECODER | dict(head_dim=8, query_pre_attn_scalar=8)
DECODERS = {
    "llama": MODELS["llama"],
    "mistral": ("MistralConfig", _DECODER | dict(sliding_window=5)),
    "qwen2": ("Qwen2Config", _DECODER | _ALTERNATING | dict(use_sliding_window=True)),
    "qwen3": ("Qwen3Config", _DECODER | dict(head_dim=8)),
    "gemma": ("GemmaConfig", _DECODER | dict(head_dim=8)),
    "gemma2": ("Gemma2Config", _GEMMA | _ALTERNATING | dict(attn_logit_softcapping=2.0)),
    "gemma3_text": ("Gemma3TextConfig", _GEMMA | _ALTERNATING),
    "phi3": ("Phi3Config", _DECODER | dict(sliding_window=5)),
    "olmo2": ("Olmo2Config", _DECODER),
    "granite": ("GraniteConfig", _DECODER),
    "smollm3": ("SmolLM3Config", _DECODER | _ALTERNATING | dict(use_sliding_window=True)),
}
# Built as decoders are, and bidirectional by themselves.
ENCODING_DECODERS = {
    "ministral3": ("Ministral3Config", _DECODER | dict(is_causal=False, sliding_window=5)),
    "llama-encoding": ("LlamaConfig", _DECODER | dict(is_causal=False)),
    "mistral-encoding": ("MistralConfig", _DECODER | dict(is_causal=False, sliding_window=5)),
    "gemma3-encoding": ("Gemma3TextConfig", _GEMMA | _ALTERNATING | dict(use_bidirectional_attention=True)),
    "embedding_gemma2": (
        "EmbeddingGemma2TextConfig",
        _DECODER
        | _ALTERNATING
        | dict(head_dim=8, global_head_dim=16, hidden_size_per_layer_input=16, embedding_dim=24),
    ),
}
_T5 = dict(vocab_size=100, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, dropout_rate=0.0, pad_token_id=0)
T5_ENCODERS = {name: (f"{name}Config", _T5 | dict(initializer_factor=1.0)) for name in ("T5", "MT5", "UMT5")}
MODELS |= DECODERS | ENCODING_DECODERS | T5_ENCODERS


def make_model(folder: Path, kind: str, seed: int = 0, **changes) -> Path:
    """A folder with a random tiny model of a kind in MODELS, without dropout."""
    import torch
    import transformers

    config_class, settings = MODELS[kind]
    config = getattr(transformers, config_class)(**(dict(initializer_range=0.3) | settings | changes))
    torch.manual_seed(seed)
    options = {"add_pooling_layer": False} if kind in ("bert", "roberta", "xlm-roberta", "mpnet") else {}
    model = transformers.AutoModel.from_config(config, **options)
    model.save_pretrained(folder)
    make_tokenizer(folder, bert=kind not in DECODERS)
    return folder


def sentence(rng: random.Random, low: int = 1, high: int = 24) -> str:
    return " ".join(rng.choices(WORDS, k=rng.randint(low, high)))


def make_training_file(
    path: Path, num_records: int, num_negatives: int = 2, seed: int = 0, num_documents: int | None = None
) -> Path:
    """Records whose query is a few words of its document, so that there is something to learn.

    num_documents: all documents of the file are among so many; without it, each is new.
    """
    rng = random.Random(seed)
    documents = [sentence(rng, 4) for _ in range(num_documents or num_records)]
    with open(path, "w", encoding="utf-8") as file:
        for number in range(num_records):
            document = documents[number % len(documents)]
            query = " ".join(rng.sample(document.split(), k=min(4, len(document.split()))))
            record = {"query": query, "pos_doc": document, "query_id": f"q{number}"}
            record["doc_id"] = f"d{number % len(documents)}"
            if num_negatives:
                others = [other for other in documents if other != document] if num_documents else None
                record["neg_doc"] = [rng.choice(others) if others else sentence(rng) for _ in range(num_negatives)]
            file.write(json.dumps(record) + "\n")
    return path


def write_teacher_scores(path: Path, seed: int = 0) -> Path:
    """Give every record of a JSONL training file a teacher's pos_score and neg_scores."""
    rng = random.Random(seed)
    records = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    with open(path, "w", encoding="utf-8") as file:
        for record in records:
            record["pos_score"] = rng.gauss(1, 1)
            record["neg_scores"] = [rng.gauss(0, 1) for _ in record["neg_doc"]]
            file.write(json.dumps(record) + "\n")
    return path


def write_labelled_texts(path: Path, num_texts: int, num_labels: int = 4, seed: int = 0) -> Path:
    """Texts of a few words, some of them drawn from those of their label; the first text stands under two labels."""
    rng = random.Random(seed)
    with open(path, "w", encoding="utf-8") as file:
        for number in range(num_texts):
            label = number % num_labels
            words = rng.sample(WORDS[10 * label : 10 * label + 10], k=3) + rng.sample(WORDS, k=2)
            text = " ".join(WORDS[:4] if number < 2 else words)
            file.write(json.dumps({"text": text, "label": f"class {label}"}) + "\n")
    return path


def write_scored_pairs(path: Path, num_pairs: int, seed: int = 0) -> Path:
    """Scored pairs of sentences, the score being the share of words that the two have in common; many are equal."""
    rng = random.Random(seed)
    with open(path, "w", encoding="utf-8") as file:
        for _ in range(num_pairs):
            first = rng.sample(WORDS, k=6)
            number = rng.randint(0, 4)
            second = first[:number] + rng.sample(WORDS, k=6 - number)
            pair = {"sentence1": " ".join(first), "sentence2": " ".join(second), "score": number / 4}
            file.write(json.dumps(pair) + "\n")
    return path


def load_recipe(name: str):
    """A recipe as a module, to call its main(argv) without a process of its own."""
    spec = importlib.util.spec_from_file_location(f"{name}_recipe", REPOSITORY / "recipes" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def launch(
    num_ranks: int,
    script: Path | str,
    *flags,
    timeout: float = 900,
    environment: dict[str, str] | None = None,
    fork: bool = True,
) -> subprocess.CompletedProcess:
    """Run a script on `num_ranks` ranks with the real launcher, or as one plain process if 0.

    Its interpreters are forks with everything imported (forked.py), unless `fork` is false.
    """
    command, variables = launch_command(num_ranks, script, *flags), launch_environment() | (environment or {})
    if fork:
        return forked.run(command, variables, REPOSITORY, timeout)
    return subprocess.run(command, cwd=REPOSITORY, env=variables, text=True, timeout=timeout, capture_output=True)


def start(
    num_ranks: int, script: Path | str, *flags, log: Path, environment: dict[str, str] | None = None
) -> forked.Program:
    """As `launch`, but goes on while the job runs, in a process group of its own, its output appended to `log`."""
    command, variables = launch_command(num_ranks, script, *flags), launch_environment() | (environment or {})
    return forked.Program(command, variables, REPOSITORY, log, log)


def leave_out_when_fast() -> None:
    """Skip the test where `pytest --fast` asks for those that need no second process."""
    if os.environ.get("DS_EMBED_TESTS_FAST"):
        pytest.skip("starts ranks or another long process, which --fast leaves out")


def free_port() -> int:
    """A TCP port that nothing listens on, below those that the system gives to whoever asks for any (between this answer
    and the first rank's start, connections of other ranks would take one of those now and then), and above those that
    slurm/launch.sh counts up from 20000."""
    while True:
        port = random.SystemRandom().randrange(21_000, 32_000)
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
                return port
            except OSError:
                continue


def launch_command(num_ranks: int, script: Path | str, *flags) -> list[str]:
    leave_out_when_fast()
    script = str(REPOSITORY / script)
    arguments = [str(flag) for flag in flags]
    if not num_ranks:
        return [sys.executable, script, *arguments]
    return [
        sys.executable,
        "-m",
        "deepspeed.launcher.runner",
        "--num_gpus",
        str(num_ranks),
        "--master_port",
        str(free_port()),
        script,
        *arguments,
    ]


def launch_environment() -> dict[str, str]:
    # Without what a recipe that was called in this process has noted of its own job of one rank.
    job = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    return {name: value for name, value in os.environ.items() if name not in job} | {
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "HF_HUB_OFFLINE": "1",
        # Four ranks on two cores: one thread each, whatever the machine.
        "OMP_NUM_THREADS": "1",
    }


def check(result: subprocess.CompletedProcess) -> subprocess.CompletedProcess:
    """Fail the test with the job's own output when the job failed."""
    assert result.returncode == 0, f"exit code {result.returncode}\n{result.stdout[-3000:]}\n{result.stderr[-6000:]}"
    return result
