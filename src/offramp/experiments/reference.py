"""The rival of the demo: the same run folder in transformers, whole in memory. A process of its own, so that its peak
is its own.

`python -m offramp.experiments.reference FOLDER INPUT.jsonl MAX_LENGTH THREADS` prints a JSON line an input and the
record last, as `offramp run` does."""

from __future__ import annotations

import json
import sys
import time

from offramp.measure import median, read_memory
from offramp.tasks.inputs import read_inputs


def main(folder: str, path: str, max_length: int, num_threads: int) -> None:
    """Classify the texts one by one."""
    import torch
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    torch.set_num_threads(num_threads)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    latencies = []
    for text in read_inputs(path):
        started = time.perf_counter()
        with torch.inference_mode():
            parts = (text,) if isinstance(text, str) else text
            inputs = tokenizer(*parts, truncation=True, max_length=max_length, return_tensors="pt")
            probability_C = model(**inputs).logits[0].softmax(0)
        latencies.append(time.perf_counter() - started)
        best = int(probability_C.argmax())
        print(json.dumps({"label": model.config.id2label[best], "score": float(probability_C[best])}))
    record = {
        "latency_seconds_median": median(latencies),
        "seconds_total": sum(latencies),
        "peak_rss_bytes": read_memory().peak_bytes,
        "num_inputs": len(latencies),
    }
    print(json.dumps({"record": record}))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4]))
